-- Run after the rows are in: building an index once is faster than keeping it up row by row.

ALTER TABLE users
    ADD CONSTRAINT users_username_key UNIQUE (username),
    ADD CONSTRAINT users_email_key UNIQUE (email);
CREATE INDEX users_last_name_idx ON users (last_name);
CREATE INDEX users_phone_number_idx ON users (phone_number);
CREATE INDEX users_created_at_idx ON users (created_at);

ALTER TABLE trading_accounts
    ADD CONSTRAINT trading_accounts_account_number_key UNIQUE (account_number),
    ADD CONSTRAINT trading_accounts_user_id_fkey
        FOREIGN KEY (user_id) REFERENCES users (id) ON DELETE CASCADE;
CREATE INDEX trading_accounts_user_id_idx ON trading_accounts (user_id);

ALTER TABLE positions
    ADD CONSTRAINT positions_account_id_fkey
        FOREIGN KEY (account_id) REFERENCES trading_accounts (id) ON DELETE CASCADE;
CREATE INDEX positions_account_id_idx ON positions (account_id);
CREATE INDEX positions_symbol_opened_at_idx ON positions (symbol, opened_at);
CREATE INDEX positions_entry_price_idx ON positions (entry_price);

ALTER TABLE trades
    ADD CONSTRAINT trades_account_id_fkey
        FOREIGN KEY (account_id) REFERENCES trading_accounts (id) ON DELETE CASCADE,
    ADD CONSTRAINT trades_position_id_fkey
        FOREIGN KEY (position_id) REFERENCES positions (id) ON DELETE SET NULL;
CREATE INDEX trades_account_id_executed_at_idx ON trades (account_id, executed_at);
CREATE INDEX trades_position_id_idx ON trades (position_id);
CREATE INDEX trades_order_id_idx ON trades (order_id);

ALTER TABLE api_keys
    ADD CONSTRAINT api_keys_key_hash_key UNIQUE (key_hash),
    ADD CONSTRAINT api_keys_user_id_fkey
        FOREIGN KEY (user_id) REFERENCES users (id) ON DELETE CASCADE;
CREATE INDEX api_keys_user_id_idx ON api_keys (user_id);

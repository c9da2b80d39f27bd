-- The rows of the sample. Every value is a function of its row's number, its column's salt and the seed;
-- no salt is used twice. The loader has made, as constant functions: pg_temp.seed(), pg_temp.<table>_rows()
-- with the number of rows, and pools of words and of difficult values, each a text[].

-- A number from 0 to n - 1. Hash partitioning relies on hashint8extended: it gives the same everywhere.
CREATE FUNCTION pg_temp.draw(i bigint, salt integer, n bigint) RETURNS bigint IMMUTABLE LANGUAGE sql
RETURN mod(hashint8extended(i, pg_temp.seed() + salt) & 9223372036854775807, n);

CREATE FUNCTION pg_temp.pick(pool text[], i bigint, salt integer) RETURNS text IMMUTABLE LANGUAGE sql
RETURN pool[1 + pg_temp.draw(i, salt, cardinality(pool))];

-- Names and places come in blocks, one per locale: a person's all come from the same one.
CREATE FUNCTION pg_temp.local(pool text[], i bigint, salt integer) RETURNS text IMMUTABLE LANGUAGE sql
RETURN pool[1 + pg_temp.draw(i, 117, cardinality(pg_temp.locales()))
                * (cardinality(pool) / cardinality(pg_temp.locales()))
            + pg_temp.draw(i, salt, cardinality(pool) / cardinality(pg_temp.locales()))];

-- The first rows hold the pool of difficult values, turned so that columns do not have the same one.
CREATE FUNCTION pg_temp.is_difficult(pool text[], i bigint) RETURNS boolean IMMUTABLE LANGUAGE sql
RETURN i <= cardinality(pool);

CREATE FUNCTION pg_temp.difficult(pool text[], i bigint, salt integer) RETURNS text IMMUTABLE LANGUAGE sql
RETURN pool[1 + mod(i + salt, cardinality(pool))];

-- A spread over six orders of magnitude, in units of 10^-digits.
CREATE FUNCTION pg_temp.amount(i bigint, salt integer, digits integer) RETURNS numeric IMMUTABLE LANGUAGE sql
RETURN (((1 + pg_temp.draw(i, salt, 999999)) * (ARRAY[1, 10, 1000, 100000])[1 + pg_temp.draw(i, salt + 1, 4)]
    + pg_temp.draw(i, salt + 2, 100000))::numeric * (10::numeric ^ -digits))::numeric(28, 10);

CREATE FUNCTION pg_temp.moment(i bigint, salt integer) RETURNS timestamptz STABLE LANGUAGE sql
RETURN timestamptz '2021-01-04 09:30:00+00' + make_interval(secs => pg_temp.draw(i, salt, 120000000));

-- A position's account and symbol; its trades have the same ones.
CREATE FUNCTION pg_temp.account_of(position_id bigint) RETURNS bigint IMMUTABLE LANGUAGE sql
RETURN 1 + pg_temp.draw(position_id, 301, pg_temp.trading_accounts_rows());

CREATE FUNCTION pg_temp.symbol_of(position_id bigint) RETURNS text IMMUTABLE LANGUAGE sql
RETURN (ARRAY['AAPL', 'MSFT', 'NVDA', 'BRK.B', 'SAP.DE', '7203.T', 'BTC/USDT', 'ETH/USDT', 'SOL/USDT',
    'EUR/USD', 'GBP/JPY', 'XAU/USD'])[1 + pg_temp.draw(position_id, 302, 12)];

INSERT INTO users (id, username, email, phone_number, first_name, last_name, address_data, two_factor_secret,
                   password_hash, status, is_active, two_factor_enabled, locale, last_login_at,
                   created_at, updated_at)
SELECT i,
       pg_temp.pick(pg_temp.handles(), i, 101) || '_' || i,
       CASE WHEN pg_temp.is_difficult(pg_temp.difficult_emails(), i)
            THEN pg_temp.difficult(pg_temp.difficult_emails(), i, 102)
            ELSE pg_temp.pick(pg_temp.handles(), i, 101)
                 || (ARRAY['.', '_', '+', '-'])[1 + pg_temp.draw(i, 103, 4)]
                 || i || '@' || pg_temp.pick(pg_temp.domains(), i, 104) END,
       CASE WHEN pg_temp.is_difficult(pg_temp.difficult_short_texts(), i)
            THEN pg_temp.difficult(pg_temp.difficult_short_texts(), i, 105)
            WHEN i % 23 = 5 THEN NULL
            ELSE (ARRAY['+1 ', '+44 ', '+49', '+81-', '0', '(+33) '])[1 + pg_temp.draw(i, 106, 6)]
                 || 200 + pg_temp.draw(i, 107, 800) || ' ' || lpad(pg_temp.draw(i, 108, 10000000)::text, 7, '0') END,
       CASE WHEN pg_temp.is_difficult(pg_temp.difficult_texts(), i)
            THEN pg_temp.difficult(pg_temp.difficult_texts(), i, 109)
            WHEN i % 23 = 7 THEN NULL
            ELSE pg_temp.local(pg_temp.first_names(), i, 110) END,
       CASE WHEN pg_temp.is_difficult(pg_temp.difficult_texts(), i)
            THEN pg_temp.difficult(pg_temp.difficult_texts(), i, 111)
            WHEN i % 23 = 9 THEN NULL
            ELSE pg_temp.local(pg_temp.last_names(), i, 112) END,
       CASE WHEN pg_temp.is_difficult(pg_temp.difficult_documents(), i)
            THEN pg_temp.difficult(pg_temp.difficult_documents(), i, 113)::jsonb
            WHEN i % 23 = 11 THEN NULL
            ELSE jsonb_build_object(
                     'street', pg_temp.local(pg_temp.streets(), i, 114),
                     'city', pg_temp.local(pg_temp.cities(), i, 115),
                     'postal_code', lpad(pg_temp.draw(i, 116, 100000)::text, 5, '0'),
                     'country', right(pg_temp.pick(pg_temp.locales(), i, 117), 2)) END,
       CASE WHEN pg_temp.is_difficult(pg_temp.difficult_texts(), i)
            THEN pg_temp.difficult(pg_temp.difficult_texts(), i, 118)
            WHEN pg_temp.draw(i, 119, 3) = 0 THEN NULL
            ELSE translate(upper(md5('totp' || pg_temp.seed() || ' ' || i)), '0189', 'WXYZ') END,
       '$argon2id$v=19$m=65536,t=3,p=4$' || md5('salt' || i) || '$' || md5('hash' || pg_temp.seed() || ' ' || i),
       CASE pg_temp.draw(i, 120, 40) WHEN 0 THEN 'closed' WHEN 1 THEN 'suspended' ELSE 'active' END,
       pg_temp.draw(i, 120, 40) > 1,
       pg_temp.draw(i, 119, 3) <> 0,
       pg_temp.pick(pg_temp.locales(), i, 117),
       CASE WHEN pg_temp.draw(i, 121, 9) > 0
            THEN pg_temp.moment(i, 122) + make_interval(secs => pg_temp.draw(i, 123, 30000000)) END,
       pg_temp.moment(i, 122),
       pg_temp.moment(i, 122) + make_interval(secs => pg_temp.draw(i, 123, 30000000))
FROM generate_series(1, pg_temp.users_rows()) AS row (i);

INSERT INTO trading_accounts (id, user_id, exchange, account_type, currency, account_number, balance,
                              available_balance, api_key_reference, status, is_active, opened_at,
                              created_at, updated_at)
SELECT i,
       1 + pg_temp.draw(i, 201, pg_temp.users_rows()),
       (ARRAY['binance', 'kraken', 'coinbase', 'ibkr', 'saxo'])[1 + pg_temp.draw(i, 202, 5)],
       (ARRAY['spot', 'margin', 'futures'])[1 + pg_temp.draw(i, 203, 3)],
       (ARRAY['USD', 'EUR', 'JPY', 'USDT'])[1 + pg_temp.draw(i, 204, 4)],
       CASE WHEN pg_temp.is_difficult(pg_temp.difficult_texts(), i)
            THEN pg_temp.difficult(pg_temp.difficult_texts(), i, 205)
            -- The multiplier has no factor in common with the modulus, so no number comes twice.
            ELSE 'AP' || lpad(((i * 2654435761 + pg_temp.seed()) % 10000000000)::text, 10, '0') END,
       CASE WHEN pg_temp.is_difficult(pg_temp.difficult_amounts(), i)
            THEN pg_temp.difficult(pg_temp.difficult_amounts(), i, 206)::numeric
            ELSE pg_temp.amount(i, 207, 4) END,
       CASE WHEN pg_temp.is_difficult(pg_temp.difficult_amounts(), i)
            THEN pg_temp.difficult(pg_temp.difficult_amounts(), i, 206)::numeric
            ELSE trunc(pg_temp.amount(i, 207, 4) * pg_temp.draw(i, 210, 101) / 100, 8) END,
       CASE WHEN pg_temp.is_difficult(pg_temp.difficult_long_texts(), i)
            THEN pg_temp.difficult(pg_temp.difficult_long_texts(), i, 211)
            WHEN i % 23 = 3 THEN NULL
            ELSE 'vault:secret/exchanges/' || pg_temp.draw(i, 212, 1000000) || '#' || md5('api' || i) END,
       CASE pg_temp.draw(i, 213, 30) WHEN 0 THEN 'closed' WHEN 1 THEN 'frozen' ELSE 'open' END,
       pg_temp.draw(i, 213, 30) > 1,
       pg_temp.moment(i, 214),
       pg_temp.moment(i, 214),
       pg_temp.moment(i, 214) + make_interval(secs => pg_temp.draw(i, 215, 30000000))
FROM generate_series(1, pg_temp.trading_accounts_rows()) AS row (i);

INSERT INTO positions (id, account_id, symbol, side, leverage, size, entry_price, current_price,
                       unrealized_pnl, realized_pnl, metadata, status, opened_at, closed_at,
                       created_at, updated_at)
SELECT i,
       pg_temp.account_of(i),
       pg_temp.symbol_of(i),
       (ARRAY['long', 'long', 'short'])[1 + pg_temp.draw(i, 303, 3)],
       (ARRAY[1, 1, 1, 2, 3, 5, 10, 25])[1 + pg_temp.draw(i, 304, 8)],
       CASE WHEN pg_temp.is_difficult(pg_temp.difficult_amounts(), i)
            THEN pg_temp.difficult(pg_temp.difficult_amounts(), i, 305)::numeric
            ELSE pg_temp.amount(i, 306, 6) END,
       CASE WHEN pg_temp.is_difficult(pg_temp.difficult_numerics(), i)
            THEN pg_temp.difficult(pg_temp.difficult_numerics(), i, 309)::numeric
            ELSE round(pg_temp.amount(i, 310, 4), 2 + (pg_temp.draw(i, 313, 7))::integer) END,
       CASE WHEN pg_temp.is_difficult(pg_temp.difficult_numerics(), i)
            THEN pg_temp.difficult(pg_temp.difficult_numerics(), i, 314)::numeric
            WHEN i % 23 = 13 THEN NULL
            ELSE round(pg_temp.amount(i, 310, 4) * (80 + pg_temp.draw(i, 315, 41)) / 100, 4) END,
       CASE WHEN pg_temp.is_difficult(pg_temp.difficult_floats(), i)
            THEN pg_temp.difficult(pg_temp.difficult_floats(), i, 316)::double precision
            WHEN i % 23 = 17 THEN NULL
            ELSE (pg_temp.draw(i, 317, 2000000000) - 1000000000) / 70000.0 END,
       CASE WHEN pg_temp.is_difficult(pg_temp.difficult_floats(), i)
            THEN pg_temp.difficult(pg_temp.difficult_floats(), i, 318)::double precision
            WHEN pg_temp.draw(i, 319, 3) > 0 THEN 0
            ELSE (pg_temp.draw(i, 320, 2000000000) - 1000000000) / 130000.0 END,
       CASE WHEN pg_temp.is_difficult(pg_temp.difficult_documents(), i)
            THEN pg_temp.difficult(pg_temp.difficult_documents(), i, 321)::jsonb
            ELSE jsonb_build_object(
                     'strategy', (ARRAY['momentum', 'mean_reversion', 'carry', 'manual'])[1 + pg_temp.draw(i, 322, 4)],
                     'stop_loss', round(pg_temp.amount(i, 310, 4) * 0.9, 4),
                     'tags', jsonb_build_array(pg_temp.pick(pg_temp.handles(), i, 323), pg_temp.draw(i, 324, 100))) END,
       CASE WHEN pg_temp.draw(i, 319, 3) = 0 THEN 'closed' ELSE 'open' END,
       pg_temp.moment(i, 325),
       CASE WHEN pg_temp.draw(i, 319, 3) = 0
            THEN pg_temp.moment(i, 325) + make_interval(secs => pg_temp.draw(i, 326, 9000000)) END,
       pg_temp.moment(i, 325),
       pg_temp.moment(i, 325) + make_interval(secs => pg_temp.draw(i, 326, 9000000))
FROM generate_series(1, pg_temp.positions_rows()) AS row (i);

INSERT INTO trades (id, account_id, position_id, symbol, side, order_type, order_id, quantity, price, fee,
                    fee_currency, execution_details, executed_at, created_at, updated_at)
SELECT i,
       pg_temp.account_of(p),
       CASE WHEN i % 11 > 0 THEN p END,
       pg_temp.symbol_of(p),
       (ARRAY['buy', 'sell'])[1 + pg_temp.draw(i, 402, 2)],
       (ARRAY['market', 'limit', 'limit', 'stop'])[1 + pg_temp.draw(i, 403, 4)],
       CASE WHEN pg_temp.is_difficult(pg_temp.difficult_texts(), i)
            THEN pg_temp.difficult(pg_temp.difficult_texts(), i, 404)
            -- Two trades in a row may fill one order.
            ELSE 'ord-' || left(md5(pg_temp.seed() || ' ' || i / (1 + pg_temp.draw(i / 2, 405, 2))), 20) END,
       CASE WHEN pg_temp.is_difficult(pg_temp.difficult_amounts(), i)
            THEN pg_temp.difficult(pg_temp.difficult_amounts(), i, 406)::numeric
            ELSE pg_temp.amount(i, 407, 6) END,
       CASE WHEN pg_temp.is_difficult(pg_temp.difficult_numerics(), i)
            THEN pg_temp.difficult(pg_temp.difficult_numerics(), i, 410)::numeric
            ELSE round(pg_temp.amount(i, 411, 4), 2 + (pg_temp.draw(i, 414, 7))::integer) END,
       CASE WHEN pg_temp.is_difficult(pg_temp.difficult_amounts(), i)
            THEN pg_temp.difficult(pg_temp.difficult_amounts(), i, 415)::numeric
            WHEN i % 23 = 19 THEN NULL
            ELSE pg_temp.draw(i, 416, 10000000)::numeric / 1000000 END,
       (ARRAY['USD', 'EUR', 'USDT'])[1 + pg_temp.draw(i, 417, 3)],
       CASE WHEN pg_temp.is_difficult(pg_temp.difficult_reports(), i)
            THEN pg_temp.difficult(pg_temp.difficult_reports(), i, 418)::json
            WHEN i % 23 = 21 THEN NULL
            ELSE json_build_object(
                     'venue', (ARRAY['XNAS', 'XETR', 'XTKS', 'BNCE'])[1 + pg_temp.draw(i, 419, 4)],
                     'latency_us', pg_temp.draw(i, 420, 500000),
                     'maker', pg_temp.draw(i, 421, 2) = 1,
                     'fills', json_build_array(json_build_object(
                         'qty', round(pg_temp.draw(i, 422, 1000000) / 1000.0, 3)::text, 'seq', i))) END,
       pg_temp.moment(i, 423),
       pg_temp.moment(i, 423),
       pg_temp.moment(i, 423)
FROM generate_series(1, pg_temp.trades_rows()) AS row (i),
     LATERAL (SELECT 1 + pg_temp.draw(i, 401, pg_temp.positions_rows()) OFFSET 0) AS parent (p);

INSERT INTO api_keys (id, user_id, name, key_hash, permissions, usage_stats, is_active, expires_at,
                      last_used_at, created_at, updated_at)
SELECT md5('api key ' || pg_temp.seed() || ' ' || i)::uuid,
       1 + pg_temp.draw(i, 501, pg_temp.users_rows()),
       pg_temp.pick(pg_temp.handles(), i, 502) || ' bot',
       encode(sha256(convert_to('key ' || pg_temp.seed() || ' ' || i, 'UTF8')), 'hex'),
       CASE WHEN pg_temp.is_difficult(pg_temp.difficult_documents(), i)
            THEN pg_temp.difficult(pg_temp.difficult_documents(), i, 503)::jsonb
            ELSE to_jsonb((ARRAY['read', 'trade', 'transfer', 'withdraw'])[1:1 + pg_temp.draw(i, 504, 4)]) END,
       CASE WHEN pg_temp.is_difficult(pg_temp.difficult_documents(), i)
            THEN pg_temp.difficult(pg_temp.difficult_documents(), i, 505)::jsonb
            WHEN i % 23 = 1 THEN NULL
            ELSE jsonb_build_object(
                     'calls', pg_temp.draw(i, 506, 1000000),
                     'by_endpoint', jsonb_build_object('/v1/orders', pg_temp.draw(i, 507, 50000),
                                                       '/v1/positions', pg_temp.draw(i, 508, 50000)),
                     'error_rate', round(pg_temp.draw(i, 509, 10000) / 1000000.0, 6)) END,
       pg_temp.draw(i, 510, 12) > 0,
       CASE WHEN pg_temp.draw(i, 511, 3) = 0 THEN pg_temp.moment(i, 512) + interval '365 days' END,
       CASE WHEN pg_temp.draw(i, 513, 5) > 0 THEN pg_temp.moment(i, 512) + interval '30 days' END,
       pg_temp.moment(i, 512),
       pg_temp.moment(i, 512)
FROM generate_series(1, pg_temp.api_keys_rows()) AS row (i);

SELECT setval(pg_get_serial_sequence('users', 'id'), pg_temp.users_rows()),
       setval(pg_get_serial_sequence('trading_accounts', 'id'), pg_temp.trading_accounts_rows()),
       setval(pg_get_serial_sequence('positions', 'id'), pg_temp.positions_rows()),
       setval(pg_get_serial_sequence('trades', 'id'), pg_temp.trades_rows());

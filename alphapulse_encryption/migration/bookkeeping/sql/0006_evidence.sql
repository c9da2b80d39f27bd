-- Evidence carries a MAC by a key that no role has, over what it says and the number of the entry of the audit log that
-- was made with it: to that log roles only add, so that what is not the newest is known. What was kept before has none.
ALTER TABLE alphapulse_encryption.verifications ADD COLUMN number bigint, ADD COLUMN mac text;
ALTER TABLE alphapulse_encryption.row_counts ADD COLUMN number bigint, ADD COLUMN mac text;
ALTER TABLE alphapulse_encryption.tables ADD COLUMN number bigint, ADD COLUMN mac text;
-- Of these, a copy of an older row would be a newer one.
ALTER TABLE alphapulse_encryption.backups ADD COLUMN number bigint UNIQUE, ADD COLUMN mac text;
ALTER TABLE alphapulse_encryption.approvals ADD COLUMN number bigint UNIQUE, ADD COLUMN mac text;
ALTER TABLE alphapulse_encryption.definitions ADD COLUMN number bigint UNIQUE, ADD COLUMN mac text;
CREATE INDEX audit_log_table_name_action ON alphapulse_encryption.audit_log (table_name, action);

-- The schema, and which of these files were applied to it. Whoever runs them owns what they create: where duties are
-- separated, that is not the role that migrates. None of it ever holds a value of user data.
CREATE SCHEMA alphapulse_encryption;
COMMENT ON SCHEMA alphapulse_encryption IS 'What alphapulse_encryption keeps of an encryption migration.';
CREATE TABLE alphapulse_encryption.versions (
    version int PRIMARY KEY,
    name text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    applied_by text NOT NULL DEFAULT session_user);

-- Keys of rows and boundaries of ranges are kept in text form, tables by their key in the catalogue.
CREATE TABLE alphapulse_encryption.columns (
    table_name text NOT NULL,
    column_name text NOT NULL,
    status text NOT NULL DEFAULT 'pending'
        CHECK (status IN ('pending', 'in_progress', 'completed', 'failed')),
    started_at timestamptz,
    completed_at timestamptz,
    records_processed bigint NOT NULL DEFAULT 0,
    error_message text,
    PRIMARY KEY (table_name, column_name));
CREATE TABLE alphapulse_encryption.tables (
    table_name text PRIMARY KEY,
    authority text NOT NULL DEFAULT 'plaintext' CHECK (authority IN ('plaintext', 'ciphertext')),
    stage text NOT NULL DEFAULT 'columns' CHECK (stage IN ('columns', 'dropped', 'restoring')),
    set_aside jsonb NOT NULL DEFAULT '{}',
    changed_at timestamptz NOT NULL DEFAULT now());
CREATE TABLE alphapulse_encryption.ranges (
    table_name text NOT NULL,
    batch_range int NOT NULL,
    lower_key text[],
    upper_key text[],
    status text NOT NULL DEFAULT 'pending'
        CHECK (status IN ('pending', 'in_progress', 'completed', 'failed')),
    position text[],
    rows_processed bigint NOT NULL DEFAULT 0,
    values_processed bigint NOT NULL DEFAULT 0,
    started_at timestamptz,
    updated_at timestamptz,
    completed_at timestamptz,
    waiting_for text,
    error_message text,
    PRIMARY KEY (table_name, batch_range));
CREATE TABLE alphapulse_encryption.verifications (
    table_name text NOT NULL,
    batch_range int NOT NULL,
    verified_at timestamptz NOT NULL,
    definition text NOT NULL,
    key_check text NOT NULL,
    row_count bigint NOT NULL,
    columns jsonb NOT NULL,
    offenders jsonb NOT NULL,
    run_id text,
    since xid8,
    PRIMARY KEY (table_name, batch_range));
CREATE TABLE alphapulse_encryption.row_counts (
    table_name text PRIMARY KEY,
    counted_at timestamptz NOT NULL,
    since xid8 NOT NULL,
    row_count bigint NOT NULL,
    verified_count bigint NOT NULL,
    missing_count bigint NOT NULL,
    run_id text);
CREATE TABLE alphapulse_encryption.key_checks (
    key_version int PRIMARY KEY,
    check_value text NOT NULL,
    first_used_at timestamptz NOT NULL DEFAULT now());
CREATE TABLE alphapulse_encryption.key_usage (
    context text NOT NULL,
    key_version int NOT NULL,
    source text NOT NULL CHECK (source IN ('engine', 'application')),
    messages bigint NOT NULL CHECK (messages >= 0),
    first_used_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (context, key_version, source));
CREATE TABLE alphapulse_encryption.key_versions (
    key_version int PRIMARY KEY,
    state text NOT NULL CHECK (state IN ('current', 'readable', 'retired')),
    since timestamptz NOT NULL DEFAULT clock_timestamp(),
    changed_by text NOT NULL,
    run_id text,
    counted_at timestamptz,
    found jsonb);
CREATE UNIQUE INDEX one_current_key_version
    ON alphapulse_encryption.key_versions (state) WHERE state = 'current';
CREATE TABLE alphapulse_encryption.rotation_ranges (
    table_name text NOT NULL,
    batch_range int NOT NULL,
    to_version int NOT NULL,
    status text NOT NULL DEFAULT 'pending'
        CHECK (status IN ('pending', 'in_progress', 'completed', 'failed')),
    position text[],
    rows_processed bigint NOT NULL DEFAULT 0,
    values_processed bigint NOT NULL DEFAULT 0,
    started_at timestamptz,
    updated_at timestamptz,
    completed_at timestamptz,
    waiting_for text,
    error_message text,
    PRIMARY KEY (table_name, batch_range, to_version));
CREATE TABLE alphapulse_encryption.backups (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    taken_at timestamptz NOT NULL,
    location text NOT NULL,
    bytes bigint NOT NULL,
    sha256 text NOT NULL,
    recipient text NOT NULL,
    listed_entries int NOT NULL,
    verified_at timestamptz NOT NULL,
    tables text[] NOT NULL,
    run_id text,
    drilled_at timestamptz,
    drill jsonb,
    uploaded_at timestamptz,
    uploaded_to text);
CREATE TABLE alphapulse_encryption.approvals (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    table_name text NOT NULL,
    approver text NOT NULL,
    database_role text NOT NULL DEFAULT session_user,
    reason text NOT NULL,
    approved_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL,
    definition text NOT NULL,
    catalogue_entry text NOT NULL,
    key_check text NOT NULL,
    verified_at timestamptz NOT NULL,
    backup_id bigint NOT NULL REFERENCES alphapulse_encryption.backups (id),
    run_id text,
    consumed_at timestamptz,
    consumed_by text,
    revoked_at timestamptz,
    revoked_by text);
CREATE TABLE alphapulse_encryption.definitions (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    table_name text NOT NULL,
    saved_at timestamptz NOT NULL DEFAULT now(),
    definition jsonb NOT NULL,
    restored_at timestamptz);
CREATE TABLE alphapulse_encryption.settings (
    name text PRIMARY KEY,
    value jsonb NOT NULL,
    changed_at timestamptz NOT NULL DEFAULT now(),
    changed_by text NOT NULL DEFAULT session_user);
CREATE TABLE alphapulse_encryption.quarantine (
    table_name text NOT NULL,
    batch_range int NOT NULL,
    key text[] NOT NULL,
    reason text NOT NULL,
    since timestamptz NOT NULL DEFAULT clock_timestamp(),
    run_id text,
    step text NOT NULL DEFAULT 'backfill',
    PRIMARY KEY (table_name, key, step));
CREATE TABLE alphapulse_encryption.tuning (
    relation regclass PRIMARY KEY,
    table_name text NOT NULL,
    options text[] NOT NULL,
    toast_options text[] NOT NULL,
    since timestamptz NOT NULL DEFAULT clock_timestamp());
CREATE TABLE alphapulse_encryption.tuning_holders (
    holder uuid PRIMARY KEY,
    table_name text NOT NULL,
    pid int NOT NULL DEFAULT pg_backend_pid(),
    actor text NOT NULL,
    run_id text,
    since timestamptz NOT NULL DEFAULT clock_timestamp());
CREATE TABLE alphapulse_encryption.audit_log (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    database_role text NOT NULL DEFAULT session_user,
    actor text NOT NULL,
    run_id text,
    table_name text,
    action text NOT NULL,
    details jsonb NOT NULL DEFAULT '{}');

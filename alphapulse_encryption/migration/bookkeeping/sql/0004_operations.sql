-- One place for the progress of every operation on rows but the backfill, in place of one for rotations alone.
CREATE TABLE alphapulse_encryption.operations (
    table_name text NOT NULL,
    operation text NOT NULL CHECK (operation IN ('rotate', 'decrypt', 'discard', 'repair')),
    goal int NOT NULL DEFAULT 0,
    batch_range int NOT NULL,
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
    PRIMARY KEY (table_name, operation, goal, batch_range));
INSERT INTO alphapulse_encryption.operations
    SELECT table_name, 'rotate', to_version, batch_range, status, position, rows_processed, values_processed,
           started_at, updated_at, completed_at, waiting_for, error_message
      FROM alphapulse_encryption.rotation_ranges;
DROP TABLE alphapulse_encryption.rotation_ranges;

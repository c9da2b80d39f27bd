-- In place of 0002 where the database was begun in the layout before, with tables public.encryption_…: they move, with
-- all that is in them and with the privileges given on them. The conditions of guards refer to them by number and follow.
DO $move$
DECLARE
    moved record;
    part record;
BEGIN
    FOR moved IN
        SELECT 'encryption_' || b AS before, CASE b WHEN 'migrations' THEN 'columns' ELSE b END AS name
          FROM unnest(ARRAY['migrations', 'tables', 'ranges', 'verifications', 'row_counts', 'key_checks', 'key_usage',
                            'key_versions', 'rotation_ranges', 'backups', 'approvals', 'definitions', 'settings',
                            'quarantine', 'tuning', 'tuning_holders', 'audit_log']) AS b
    LOOP
        EXECUTE format('ALTER TABLE public.%I SET SCHEMA alphapulse_encryption', moved.before);
        EXECUTE format('ALTER TABLE alphapulse_encryption.%I RENAME TO %I', moved.before, moved.name);
        FOR part IN
            SELECT conname AS before, moved.name || substr(conname, length(moved.before) + 1) AS name
              FROM pg_catalog.pg_constraint
             WHERE conrelid = format('alphapulse_encryption.%I', moved.name)::regclass
               AND starts_with(conname, moved.before || '_')
        LOOP
            EXECUTE format('ALTER TABLE alphapulse_encryption.%I RENAME CONSTRAINT %I TO %I',
                           moved.name, part.before, part.name);
        END LOOP;
        FOR part IN
            SELECT relname AS before, moved.name || substr(relname, length(moved.before) + 1) AS name
              FROM pg_catalog.pg_class
             WHERE relnamespace = 'alphapulse_encryption'::regnamespace AND relkind = 'S'
               AND relname = moved.before || '_id_seq'
        LOOP
            EXECUTE format('ALTER SEQUENCE alphapulse_encryption.%I RENAME TO %I', part.before, part.name);
        END LOOP;
        FOR part IN
            SELECT DISTINCT CASE x.grantee WHEN 0 THEN 'PUBLIC' ELSE x.grantee::regrole::text END AS grantee
              FROM pg_catalog.pg_class c CROSS JOIN LATERAL (
                   SELECT grantee FROM aclexplode(c.relacl)
                    UNION SELECT e.grantee FROM pg_catalog.pg_attribute a CROSS JOIN aclexplode(a.attacl) e
                           WHERE a.attrelid = c.oid) x
             WHERE c.oid = format('alphapulse_encryption.%I', moved.name)::regclass AND x.grantee <> c.relowner
        LOOP
            EXECUTE format('GRANT USAGE ON SCHEMA alphapulse_encryption TO %s', part.grantee);
        END LOOP;
    END LOOP;
    -- The bodies of guards are text, which an application executes that may not look into the schema.
    FOR part IN
        SELECT pg_get_functiondef(p.oid) AS definition FROM pg_catalog.pg_proc p
         WHERE p.pronamespace = 'public'::regnamespace AND starts_with(p.proname, 'encryption_guard_')
           AND p.prosrc LIKE '%has_table_privilege(''public.encryption_ranges''::regclass, ''UPDATE'')%'
    LOOP
        EXECUTE replace(part.definition, 'has_table_privilege(''public.encryption_ranges''::regclass, ''UPDATE'')',
            'coalesce((SELECT has_table_privilege(c.oid, ''UPDATE'') FROM pg_catalog.pg_class c '
            'JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace '
            'WHERE n.nspname = ''alphapulse_encryption'' AND c.relname = ''ranges''), false)');
    END LOOP;
END $move$;
ALTER INDEX alphapulse_encryption.encryption_one_current_key_version RENAME TO one_current_key_version;
DROP TRIGGER encryption_append_only ON alphapulse_encryption.audit_log;
DROP TRIGGER encryption_approval_is_final ON alphapulse_encryption.approvals;
DROP TRIGGER encryption_setting_is_allowed ON alphapulse_encryption.settings;
DROP FUNCTION public.encryption_audit_is_append_only(), public.encryption_approval_is_final(),
    public.encryption_setting_is_allowed();
ALTER FUNCTION public.encryption_report_key_usage(text, int, bigint) RENAME TO encryption_report_key_usage_before;

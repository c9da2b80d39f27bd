-- What keeps the audit log, approvals and settings as they are meant to be, and what others use of ours in public.

-- For applications, by position. The names of its parameters are others than they were in the layout before: so a
-- program of that time, which would replace it and begin tables of its own, is refused by the server.
CREATE FUNCTION public.encryption_report_key_usage(of_context text, of_version int, of_messages bigint)
    RETURNS bigint LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF $1 IS NULL OR $2 IS NULL OR $3 IS NULL OR $3 < 0 THEN
        RAISE EXCEPTION 'encryption_report_key_usage takes a context, a key version and a number of messages';
    END IF;
    INSERT INTO alphapulse_encryption.key_usage AS u VALUES ($1, $2, 'application', $3)
        ON CONFLICT ON CONSTRAINT key_usage_pkey
        DO UPDATE SET messages = u.messages + excluded.messages, updated_at = clock_timestamp();
    RETURN (SELECT sum(u.messages) FROM alphapulse_encryption.key_usage u
             WHERE u.context = $1 AND u.key_version = $2);
END $$;
REVOKE ALL ON FUNCTION public.encryption_report_key_usage FROM PUBLIC;

CREATE FUNCTION alphapulse_encryption.audit_is_append_only() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog AS $$
BEGIN
    RAISE EXCEPTION 'alphapulse_encryption.audit_log is append-only';
END $$;
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE
    ON alphapulse_encryption.audit_log FOR EACH STATEMENT
    EXECUTE FUNCTION alphapulse_encryption.audit_is_append_only();
CREATE FUNCTION alphapulse_encryption.approval_is_final() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF has_table_privilege(TG_RELID, 'UPDATE') THEN
        RETURN NEW;
    END IF;
    IF OLD.consumed_at IS NOT NULL OR OLD.revoked_at IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'insufficient_privilege',
            MESSAGE = format('approval %s was used or revoked before', OLD.id);
    END IF;
    IF NEW.consumed_at IS NOT NULL THEN
        IF OLD.expires_at <= clock_timestamp() THEN
            RAISE EXCEPTION USING ERRCODE = 'insufficient_privilege',
                MESSAGE = format('approval %s has expired', OLD.id);
        END IF;
        IF OLD.database_role = session_user AND EXISTS (SELECT FROM alphapulse_encryption.settings s
                WHERE s.name = 'two_person_rule' AND s.value = '"roles"') THEN
            RAISE EXCEPTION USING ERRCODE = 'insufficient_privilege',
                MESSAGE = format('approval %s was given over the role that wants to use it', OLD.id);
        END IF;
        NEW.consumed_at := clock_timestamp();
    ELSE
        NEW.consumed_by := NULL;
    END IF;
    IF NEW.revoked_at IS NOT NULL THEN
        NEW.revoked_at := clock_timestamp();
    ELSE
        NEW.revoked_by := NULL;
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER approval_is_final BEFORE UPDATE ON alphapulse_encryption.approvals
    FOR EACH ROW EXECUTE FUNCTION alphapulse_encryption.approval_is_final();
CREATE FUNCTION alphapulse_encryption.setting_is_allowed() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF has_table_privilege(TG_RELID, 'INSERT') THEN
        RETURN NEW;
    END IF;
    IF NEW.name = 'two_person_rule' OR (TG_OP = 'UPDATE' AND OLD.name = 'two_person_rule') THEN
        RAISE EXCEPTION USING ERRCODE = 'insufficient_privilege',
            MESSAGE = 'two_person_rule is for the owner of alphapulse_encryption.settings to change';
    END IF;
    NEW.changed_at := now();
    NEW.changed_by := session_user;
    RETURN NEW;
END $$;
CREATE TRIGGER setting_is_allowed BEFORE INSERT OR UPDATE ON alphapulse_encryption.settings
    FOR EACH ROW EXECUTE FUNCTION alphapulse_encryption.setting_is_allowed();
REVOKE ALL ON FUNCTION alphapulse_encryption.audit_is_append_only, alphapulse_encryption.approval_is_final,
    alphapulse_encryption.setting_is_allowed FROM PUBLIC;

-- For operators, who watch it with psql.
CREATE VIEW public.encryption_migrations AS
    SELECT table_name, column_name, status, started_at, completed_at, records_processed, error_message
      FROM alphapulse_encryption.columns;
COMMENT ON VIEW public.encryption_migrations IS 'How far the encryption of each column is (alphapulse_encryption).';
-- For applications, whose instances look at it when they start.
CREATE VIEW public.encryption_tables AS
    SELECT table_name, authority, stage, set_aside FROM alphapulse_encryption.tables;
COMMENT ON VIEW public.encryption_tables IS 'Which side of each table is right (alphapulse_encryption).';

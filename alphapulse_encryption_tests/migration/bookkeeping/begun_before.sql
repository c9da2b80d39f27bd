SET standard_conforming_strings = on;
SELECT pg_catalog.set_config('search_path', '', false);
SET check_function_bodies = false;
CREATE FUNCTION public.encryption_approval_is_final() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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
        IF OLD.database_role = session_user AND EXISTS (SELECT FROM public.encryption_settings s
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
CREATE FUNCTION public.encryption_audit_is_append_only() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog'
    AS $$
BEGIN
    RAISE EXCEPTION 'encryption_audit_log is append-only';
END $$;
CREATE FUNCTION public.encryption_guard_begun() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog'
    AS $$
DECLARE
    ciphertext_is_right constant boolean := TG_ARGV[0] = 'ciphertext';
    by_engine constant boolean := (current_setting('alphapulse_encryption.writer', true) IS NOT DISTINCT FROM 'engine' AND has_table_privilege('public.encryption_ranges'::regclass, 'UPDATE'));
    mentions boolean := false;
BEGIN
    IF TG_ARGV[1] <> '' THEN
        IF NOT by_engine THEN
            PERFORM set_config('alphapulse_encryption.mentioned', concat(current_setting('alphapulse_encryption.mentioned', true), TG_ARGV[1]), true);
        END IF;
    ELSIF TG_OP = 'INSERT' THEN
        
        IF NEW."secret" IS NULL AND (NEW."secret_encrypted" IS NOT NULL OR NEW."secret_search" IS NOT NULL) AND NOT ciphertext_is_right THEN
            RAISE EXCEPTION USING ERRCODE = 'check_violation', TABLE = TG_TABLE_NAME, SCHEMA = TG_TABLE_SCHEMA,
                COLUMN = 'secret_encrypted', MESSAGE = 'begun.secret_encrypted was written without begun.secret, which is still what readers use', HINT = 'Write both columns in one statement, or write the plaintext alone and let the backfill encrypt it. Ciphertext alone is accepted after switch_to_ciphertext of begun.';
        ELSIF NEW."secret" IS NOT NULL AND (NEW."secret_encrypted" IS NULL) <> (NEW."secret_search" IS NULL) THEN
            NEW."secret_encrypted" := NULL; NEW."secret_search" := NULL;
        END IF;
        IF NEW."other" IS NULL AND (NEW."other_encrypted" IS NOT NULL) AND NOT ciphertext_is_right THEN
            RAISE EXCEPTION USING ERRCODE = 'check_violation', TABLE = TG_TABLE_NAME, SCHEMA = TG_TABLE_SCHEMA,
                COLUMN = 'other_encrypted', MESSAGE = 'begun.other_encrypted was written without begun.other, which is still what readers use', HINT = 'Write both columns in one statement, or write the plaintext alone and let the backfill encrypt it. Ciphertext alone is accepted after switch_to_ciphertext of begun.';
        ELSIF NEW."other" IS NOT NULL AND false THEN
            NEW."other_encrypted" := NULL;
        END IF;
    ELSE
        
        IF by_engine THEN
            IF OLD."secret" IS NOT NULL AND pg_catalog.record_image_ne(ROW(OLD."secret"), ROW(NEW."secret")) THEN
                NEW."secret_encrypted" := NULL; NEW."secret_search" := NULL;
            END IF;
        ELSIF pg_catalog.record_image_ne(ROW(OLD."secret"), ROW(NEW."secret")) THEN
            IF NEW."secret_encrypted" IS NULL OR NOT (pg_catalog.record_image_ne(ROW(OLD."secret_encrypted"), ROW(NEW."secret_encrypted"))) OR (NEW."secret" IS NOT NULL AND (NEW."secret_search" IS NULL OR NEW."secret_search" = OLD."secret_search")) THEN
                NEW."secret_encrypted" := NULL; NEW."secret_search" := NULL;
            ELSIF NEW."secret" IS NULL AND NOT ciphertext_is_right THEN
                RAISE EXCEPTION USING ERRCODE = 'check_violation', TABLE = TG_TABLE_NAME, SCHEMA = TG_TABLE_SCHEMA,
                COLUMN = 'secret_encrypted', MESSAGE = 'begun.secret_encrypted was written without begun.secret, which is still what readers use', HINT = 'Write both columns in one statement, or write the plaintext alone and let the backfill encrypt it. Ciphertext alone is accepted after switch_to_ciphertext of begun.';
            END IF;
        ELSIF pg_catalog.record_image_ne(ROW(OLD."secret_encrypted", OLD."secret_search"), ROW(NEW."secret_encrypted", NEW."secret_search")) THEN
            IF strpos(coalesce(current_setting('alphapulse_encryption.mentioned', true), ''), '<0>') > 0 THEN
                mentions := true;
                IF NEW."secret_encrypted" IS NULL OR (NEW."secret" IS NOT NULL AND NEW."secret_search" IS NULL) THEN
                    NEW."secret_encrypted" := NULL; NEW."secret_search" := NULL;
                ELSIF NEW."secret" IS NULL AND NOT ciphertext_is_right THEN
                    RAISE EXCEPTION USING ERRCODE = 'check_violation', TABLE = TG_TABLE_NAME, SCHEMA = TG_TABLE_SCHEMA,
                COLUMN = 'secret_encrypted', MESSAGE = 'begun.secret_encrypted was written without begun.secret, which is still what readers use', HINT = 'Write both columns in one statement, or write the plaintext alone and let the backfill encrypt it. Ciphertext alone is accepted after switch_to_ciphertext of begun.';
                END IF;
            ELSIF NOT ciphertext_is_right THEN
                RAISE EXCEPTION USING ERRCODE = 'check_violation', TABLE = TG_TABLE_NAME, SCHEMA = TG_TABLE_SCHEMA,
                COLUMN = 'secret_encrypted', MESSAGE = 'begun.secret_encrypted was written without begun.secret, which is still what readers use', HINT = 'Write both columns in one statement, or write the plaintext alone and let the backfill encrypt it. Ciphertext alone is accepted after switch_to_ciphertext of begun.';
            ELSIF pg_catalog.record_image_ne(ROW(OLD."secret_encrypted"), ROW(NEW."secret_encrypted")) THEN
                NEW."secret" := NULL;
            END IF;
        END IF;
        IF by_engine THEN
            IF OLD."other" IS NOT NULL AND pg_catalog.record_image_ne(ROW(OLD."other"), ROW(NEW."other")) THEN
                NEW."other_encrypted" := NULL;
            END IF;
        ELSIF pg_catalog.record_image_ne(ROW(OLD."other"), ROW(NEW."other")) THEN
            IF NEW."other_encrypted" IS NULL OR NOT (pg_catalog.record_image_ne(ROW(OLD."other_encrypted"), ROW(NEW."other_encrypted"))) OR false THEN
                NEW."other_encrypted" := NULL;
            ELSIF NEW."other" IS NULL AND NOT ciphertext_is_right THEN
                RAISE EXCEPTION USING ERRCODE = 'check_violation', TABLE = TG_TABLE_NAME, SCHEMA = TG_TABLE_SCHEMA,
                COLUMN = 'other_encrypted', MESSAGE = 'begun.other_encrypted was written without begun.other, which is still what readers use', HINT = 'Write both columns in one statement, or write the plaintext alone and let the backfill encrypt it. Ciphertext alone is accepted after switch_to_ciphertext of begun.';
            END IF;
        ELSIF pg_catalog.record_image_ne(ROW(OLD."other_encrypted"), ROW(NEW."other_encrypted")) THEN
            IF strpos(coalesce(current_setting('alphapulse_encryption.mentioned', true), ''), '<1>') > 0 THEN
                mentions := true;
                IF NEW."other_encrypted" IS NULL OR false THEN
                    NEW."other_encrypted" := NULL;
                ELSIF NEW."other" IS NULL AND NOT ciphertext_is_right THEN
                    RAISE EXCEPTION USING ERRCODE = 'check_violation', TABLE = TG_TABLE_NAME, SCHEMA = TG_TABLE_SCHEMA,
                COLUMN = 'other_encrypted', MESSAGE = 'begun.other_encrypted was written without begun.other, which is still what readers use', HINT = 'Write both columns in one statement, or write the plaintext alone and let the backfill encrypt it. Ciphertext alone is accepted after switch_to_ciphertext of begun.';
                END IF;
            ELSIF NOT ciphertext_is_right THEN
                RAISE EXCEPTION USING ERRCODE = 'check_violation', TABLE = TG_TABLE_NAME, SCHEMA = TG_TABLE_SCHEMA,
                COLUMN = 'other_encrypted', MESSAGE = 'begun.other_encrypted was written without begun.other, which is still what readers use', HINT = 'Write both columns in one statement, or write the plaintext alone and let the backfill encrypt it. Ciphertext alone is accepted after switch_to_ciphertext of begun.';
            ELSIF pg_catalog.record_image_ne(ROW(OLD."other_encrypted"), ROW(NEW."other_encrypted")) THEN
                NEW."other" := NULL;
            END IF;
        END IF;
        IF mentions THEN
            PERFORM set_config('alphapulse_encryption.mentioned', '', true);
        END IF;
    END IF;
    RETURN NEW;
END
$$;
CREATE FUNCTION public.encryption_guard_half() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog'
    AS $$
DECLARE
    ciphertext_is_right constant boolean := TG_ARGV[0] = 'ciphertext';
    by_engine constant boolean := (current_setting('alphapulse_encryption.writer', true) IS NOT DISTINCT FROM 'engine' AND has_table_privilege('public.encryption_ranges'::regclass, 'UPDATE'));
    mentions boolean := false;
BEGIN
    IF TG_ARGV[1] <> '' THEN
        IF NOT by_engine THEN
            PERFORM set_config('alphapulse_encryption.mentioned', concat(current_setting('alphapulse_encryption.mentioned', true), TG_ARGV[1]), true);
        END IF;
    ELSIF TG_OP = 'INSERT' THEN
        
        IF NEW."secret" IS NULL AND (NEW."secret_encrypted" IS NOT NULL OR NEW."secret_search" IS NOT NULL) AND NOT ciphertext_is_right THEN
            RAISE EXCEPTION USING ERRCODE = 'check_violation', TABLE = TG_TABLE_NAME, SCHEMA = TG_TABLE_SCHEMA,
                COLUMN = 'secret_encrypted', MESSAGE = 'half.secret_encrypted was written without half.secret, which is still what readers use', HINT = 'Write both columns in one statement, or write the plaintext alone and let the backfill encrypt it. Ciphertext alone is accepted after switch_to_ciphertext of half.';
        ELSIF NEW."secret" IS NOT NULL AND (NEW."secret_encrypted" IS NULL) <> (NEW."secret_search" IS NULL) THEN
            NEW."secret_encrypted" := NULL; NEW."secret_search" := NULL;
        END IF;
        IF NEW."other" IS NULL AND (NEW."other_encrypted" IS NOT NULL) AND NOT ciphertext_is_right THEN
            RAISE EXCEPTION USING ERRCODE = 'check_violation', TABLE = TG_TABLE_NAME, SCHEMA = TG_TABLE_SCHEMA,
                COLUMN = 'other_encrypted', MESSAGE = 'half.other_encrypted was written without half.other, which is still what readers use', HINT = 'Write both columns in one statement, or write the plaintext alone and let the backfill encrypt it. Ciphertext alone is accepted after switch_to_ciphertext of half.';
        ELSIF NEW."other" IS NOT NULL AND false THEN
            NEW."other_encrypted" := NULL;
        END IF;
    ELSE
        
        IF by_engine THEN
            IF OLD."secret" IS NOT NULL AND pg_catalog.record_image_ne(ROW(OLD."secret"), ROW(NEW."secret")) THEN
                NEW."secret_encrypted" := NULL; NEW."secret_search" := NULL;
            END IF;
        ELSIF pg_catalog.record_image_ne(ROW(OLD."secret"), ROW(NEW."secret")) THEN
            IF NEW."secret_encrypted" IS NULL OR NOT (pg_catalog.record_image_ne(ROW(OLD."secret_encrypted"), ROW(NEW."secret_encrypted"))) OR (NEW."secret" IS NOT NULL AND (NEW."secret_search" IS NULL OR NEW."secret_search" = OLD."secret_search")) THEN
                NEW."secret_encrypted" := NULL; NEW."secret_search" := NULL;
            ELSIF NEW."secret" IS NULL AND NOT ciphertext_is_right THEN
                RAISE EXCEPTION USING ERRCODE = 'check_violation', TABLE = TG_TABLE_NAME, SCHEMA = TG_TABLE_SCHEMA,
                COLUMN = 'secret_encrypted', MESSAGE = 'half.secret_encrypted was written without half.secret, which is still what readers use', HINT = 'Write both columns in one statement, or write the plaintext alone and let the backfill encrypt it. Ciphertext alone is accepted after switch_to_ciphertext of half.';
            END IF;
        ELSIF pg_catalog.record_image_ne(ROW(OLD."secret_encrypted", OLD."secret_search"), ROW(NEW."secret_encrypted", NEW."secret_search")) THEN
            IF strpos(coalesce(current_setting('alphapulse_encryption.mentioned', true), ''), '<0>') > 0 THEN
                mentions := true;
                IF NEW."secret_encrypted" IS NULL OR (NEW."secret" IS NOT NULL AND NEW."secret_search" IS NULL) THEN
                    NEW."secret_encrypted" := NULL; NEW."secret_search" := NULL;
                ELSIF NEW."secret" IS NULL AND NOT ciphertext_is_right THEN
                    RAISE EXCEPTION USING ERRCODE = 'check_violation', TABLE = TG_TABLE_NAME, SCHEMA = TG_TABLE_SCHEMA,
                COLUMN = 'secret_encrypted', MESSAGE = 'half.secret_encrypted was written without half.secret, which is still what readers use', HINT = 'Write both columns in one statement, or write the plaintext alone and let the backfill encrypt it. Ciphertext alone is accepted after switch_to_ciphertext of half.';
                END IF;
            ELSIF NOT ciphertext_is_right THEN
                RAISE EXCEPTION USING ERRCODE = 'check_violation', TABLE = TG_TABLE_NAME, SCHEMA = TG_TABLE_SCHEMA,
                COLUMN = 'secret_encrypted', MESSAGE = 'half.secret_encrypted was written without half.secret, which is still what readers use', HINT = 'Write both columns in one statement, or write the plaintext alone and let the backfill encrypt it. Ciphertext alone is accepted after switch_to_ciphertext of half.';
            ELSIF pg_catalog.record_image_ne(ROW(OLD."secret_encrypted"), ROW(NEW."secret_encrypted")) THEN
                NEW."secret" := NULL;
            END IF;
        END IF;
        IF by_engine THEN
            IF OLD."other" IS NOT NULL AND pg_catalog.record_image_ne(ROW(OLD."other"), ROW(NEW."other")) THEN
                NEW."other_encrypted" := NULL;
            END IF;
        ELSIF pg_catalog.record_image_ne(ROW(OLD."other"), ROW(NEW."other")) THEN
            IF NEW."other_encrypted" IS NULL OR NOT (pg_catalog.record_image_ne(ROW(OLD."other_encrypted"), ROW(NEW."other_encrypted"))) OR false THEN
                NEW."other_encrypted" := NULL;
            ELSIF NEW."other" IS NULL AND NOT ciphertext_is_right THEN
                RAISE EXCEPTION USING ERRCODE = 'check_violation', TABLE = TG_TABLE_NAME, SCHEMA = TG_TABLE_SCHEMA,
                COLUMN = 'other_encrypted', MESSAGE = 'half.other_encrypted was written without half.other, which is still what readers use', HINT = 'Write both columns in one statement, or write the plaintext alone and let the backfill encrypt it. Ciphertext alone is accepted after switch_to_ciphertext of half.';
            END IF;
        ELSIF pg_catalog.record_image_ne(ROW(OLD."other_encrypted"), ROW(NEW."other_encrypted")) THEN
            IF strpos(coalesce(current_setting('alphapulse_encryption.mentioned', true), ''), '<1>') > 0 THEN
                mentions := true;
                IF NEW."other_encrypted" IS NULL OR false THEN
                    NEW."other_encrypted" := NULL;
                ELSIF NEW."other" IS NULL AND NOT ciphertext_is_right THEN
                    RAISE EXCEPTION USING ERRCODE = 'check_violation', TABLE = TG_TABLE_NAME, SCHEMA = TG_TABLE_SCHEMA,
                COLUMN = 'other_encrypted', MESSAGE = 'half.other_encrypted was written without half.other, which is still what readers use', HINT = 'Write both columns in one statement, or write the plaintext alone and let the backfill encrypt it. Ciphertext alone is accepted after switch_to_ciphertext of half.';
                END IF;
            ELSIF NOT ciphertext_is_right THEN
                RAISE EXCEPTION USING ERRCODE = 'check_violation', TABLE = TG_TABLE_NAME, SCHEMA = TG_TABLE_SCHEMA,
                COLUMN = 'other_encrypted', MESSAGE = 'half.other_encrypted was written without half.other, which is still what readers use', HINT = 'Write both columns in one statement, or write the plaintext alone and let the backfill encrypt it. Ciphertext alone is accepted after switch_to_ciphertext of half.';
            ELSIF pg_catalog.record_image_ne(ROW(OLD."other_encrypted"), ROW(NEW."other_encrypted")) THEN
                NEW."other" := NULL;
            END IF;
        END IF;
        IF mentions THEN
            PERFORM set_config('alphapulse_encryption.mentioned', '', true);
        END IF;
    END IF;
    RETURN NEW;
END
$$;
CREATE FUNCTION public.encryption_guard_switched() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog'
    AS $$
DECLARE
    ciphertext_is_right constant boolean := TG_ARGV[0] = 'ciphertext';
    by_engine constant boolean := (current_setting('alphapulse_encryption.writer', true) IS NOT DISTINCT FROM 'engine' AND has_table_privilege('public.encryption_ranges'::regclass, 'UPDATE'));
    mentions boolean := false;
BEGIN
    IF TG_ARGV[1] <> '' THEN
        IF NOT by_engine THEN
            PERFORM set_config('alphapulse_encryption.mentioned', concat(current_setting('alphapulse_encryption.mentioned', true), TG_ARGV[1]), true);
        END IF;
    ELSIF TG_OP = 'INSERT' THEN
        
        IF NEW."secret" IS NULL AND (NEW."secret_encrypted" IS NOT NULL OR NEW."secret_search" IS NOT NULL) AND NOT ciphertext_is_right THEN
            RAISE EXCEPTION USING ERRCODE = 'check_violation', TABLE = TG_TABLE_NAME, SCHEMA = TG_TABLE_SCHEMA,
                COLUMN = 'secret_encrypted', MESSAGE = 'switched.secret_encrypted was written without switched.secret, which is still what readers use', HINT = 'Write both columns in one statement, or write the plaintext alone and let the backfill encrypt it. Ciphertext alone is accepted after switch_to_ciphertext of switched.';
        ELSIF NEW."secret" IS NOT NULL AND (NEW."secret_encrypted" IS NULL) <> (NEW."secret_search" IS NULL) THEN
            NEW."secret_encrypted" := NULL; NEW."secret_search" := NULL;
        END IF;
        IF NEW."other" IS NULL AND (NEW."other_encrypted" IS NOT NULL) AND NOT ciphertext_is_right THEN
            RAISE EXCEPTION USING ERRCODE = 'check_violation', TABLE = TG_TABLE_NAME, SCHEMA = TG_TABLE_SCHEMA,
                COLUMN = 'other_encrypted', MESSAGE = 'switched.other_encrypted was written without switched.other, which is still what readers use', HINT = 'Write both columns in one statement, or write the plaintext alone and let the backfill encrypt it. Ciphertext alone is accepted after switch_to_ciphertext of switched.';
        ELSIF NEW."other" IS NOT NULL AND false THEN
            NEW."other_encrypted" := NULL;
        END IF;
    ELSE
        
        IF by_engine THEN
            IF OLD."secret" IS NOT NULL AND pg_catalog.record_image_ne(ROW(OLD."secret"), ROW(NEW."secret")) THEN
                NEW."secret_encrypted" := NULL; NEW."secret_search" := NULL;
            END IF;
        ELSIF pg_catalog.record_image_ne(ROW(OLD."secret"), ROW(NEW."secret")) THEN
            IF NEW."secret_encrypted" IS NULL OR NOT (pg_catalog.record_image_ne(ROW(OLD."secret_encrypted"), ROW(NEW."secret_encrypted"))) OR (NEW."secret" IS NOT NULL AND (NEW."secret_search" IS NULL OR NEW."secret_search" = OLD."secret_search")) THEN
                NEW."secret_encrypted" := NULL; NEW."secret_search" := NULL;
            ELSIF NEW."secret" IS NULL AND NOT ciphertext_is_right THEN
                RAISE EXCEPTION USING ERRCODE = 'check_violation', TABLE = TG_TABLE_NAME, SCHEMA = TG_TABLE_SCHEMA,
                COLUMN = 'secret_encrypted', MESSAGE = 'switched.secret_encrypted was written without switched.secret, which is still what readers use', HINT = 'Write both columns in one statement, or write the plaintext alone and let the backfill encrypt it. Ciphertext alone is accepted after switch_to_ciphertext of switched.';
            END IF;
        ELSIF pg_catalog.record_image_ne(ROW(OLD."secret_encrypted", OLD."secret_search"), ROW(NEW."secret_encrypted", NEW."secret_search")) THEN
            IF strpos(coalesce(current_setting('alphapulse_encryption.mentioned', true), ''), '<0>') > 0 THEN
                mentions := true;
                IF NEW."secret_encrypted" IS NULL OR (NEW."secret" IS NOT NULL AND NEW."secret_search" IS NULL) THEN
                    NEW."secret_encrypted" := NULL; NEW."secret_search" := NULL;
                ELSIF NEW."secret" IS NULL AND NOT ciphertext_is_right THEN
                    RAISE EXCEPTION USING ERRCODE = 'check_violation', TABLE = TG_TABLE_NAME, SCHEMA = TG_TABLE_SCHEMA,
                COLUMN = 'secret_encrypted', MESSAGE = 'switched.secret_encrypted was written without switched.secret, which is still what readers use', HINT = 'Write both columns in one statement, or write the plaintext alone and let the backfill encrypt it. Ciphertext alone is accepted after switch_to_ciphertext of switched.';
                END IF;
            ELSIF NOT ciphertext_is_right THEN
                RAISE EXCEPTION USING ERRCODE = 'check_violation', TABLE = TG_TABLE_NAME, SCHEMA = TG_TABLE_SCHEMA,
                COLUMN = 'secret_encrypted', MESSAGE = 'switched.secret_encrypted was written without switched.secret, which is still what readers use', HINT = 'Write both columns in one statement, or write the plaintext alone and let the backfill encrypt it. Ciphertext alone is accepted after switch_to_ciphertext of switched.';
            ELSIF pg_catalog.record_image_ne(ROW(OLD."secret_encrypted"), ROW(NEW."secret_encrypted")) THEN
                NEW."secret" := NULL;
            END IF;
        END IF;
        IF by_engine THEN
            IF OLD."other" IS NOT NULL AND pg_catalog.record_image_ne(ROW(OLD."other"), ROW(NEW."other")) THEN
                NEW."other_encrypted" := NULL;
            END IF;
        ELSIF pg_catalog.record_image_ne(ROW(OLD."other"), ROW(NEW."other")) THEN
            IF NEW."other_encrypted" IS NULL OR NOT (pg_catalog.record_image_ne(ROW(OLD."other_encrypted"), ROW(NEW."other_encrypted"))) OR false THEN
                NEW."other_encrypted" := NULL;
            ELSIF NEW."other" IS NULL AND NOT ciphertext_is_right THEN
                RAISE EXCEPTION USING ERRCODE = 'check_violation', TABLE = TG_TABLE_NAME, SCHEMA = TG_TABLE_SCHEMA,
                COLUMN = 'other_encrypted', MESSAGE = 'switched.other_encrypted was written without switched.other, which is still what readers use', HINT = 'Write both columns in one statement, or write the plaintext alone and let the backfill encrypt it. Ciphertext alone is accepted after switch_to_ciphertext of switched.';
            END IF;
        ELSIF pg_catalog.record_image_ne(ROW(OLD."other_encrypted"), ROW(NEW."other_encrypted")) THEN
            IF strpos(coalesce(current_setting('alphapulse_encryption.mentioned', true), ''), '<1>') > 0 THEN
                mentions := true;
                IF NEW."other_encrypted" IS NULL OR false THEN
                    NEW."other_encrypted" := NULL;
                ELSIF NEW."other" IS NULL AND NOT ciphertext_is_right THEN
                    RAISE EXCEPTION USING ERRCODE = 'check_violation', TABLE = TG_TABLE_NAME, SCHEMA = TG_TABLE_SCHEMA,
                COLUMN = 'other_encrypted', MESSAGE = 'switched.other_encrypted was written without switched.other, which is still what readers use', HINT = 'Write both columns in one statement, or write the plaintext alone and let the backfill encrypt it. Ciphertext alone is accepted after switch_to_ciphertext of switched.';
                END IF;
            ELSIF NOT ciphertext_is_right THEN
                RAISE EXCEPTION USING ERRCODE = 'check_violation', TABLE = TG_TABLE_NAME, SCHEMA = TG_TABLE_SCHEMA,
                COLUMN = 'other_encrypted', MESSAGE = 'switched.other_encrypted was written without switched.other, which is still what readers use', HINT = 'Write both columns in one statement, or write the plaintext alone and let the backfill encrypt it. Ciphertext alone is accepted after switch_to_ciphertext of switched.';
            ELSIF pg_catalog.record_image_ne(ROW(OLD."other_encrypted"), ROW(NEW."other_encrypted")) THEN
                NEW."other" := NULL;
            END IF;
        END IF;
        IF mentions THEN
            PERFORM set_config('alphapulse_encryption.mentioned', '', true);
        END IF;
    END IF;
    RETURN NEW;
END
$$;
CREATE FUNCTION public.encryption_report_key_usage(context text, key_version integer, messages bigint) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $_$
BEGIN
    IF $1 IS NULL OR $2 IS NULL OR $3 IS NULL OR $3 < 0 THEN
        RAISE EXCEPTION 'encryption_report_key_usage takes a context, a key version and a number of messages';
    END IF;
    INSERT INTO public.encryption_key_usage AS u VALUES ($1, $2, 'application', $3)
        ON CONFLICT ON CONSTRAINT encryption_key_usage_pkey
        DO UPDATE SET messages = u.messages + excluded.messages, updated_at = clock_timestamp();
    RETURN (SELECT sum(u.messages) FROM public.encryption_key_usage u
             WHERE u.context = $1 AND u.key_version = $2);
END $_$;
CREATE FUNCTION public.encryption_setting_is_allowed() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
BEGIN
    IF has_table_privilege(TG_RELID, 'INSERT') THEN
        RETURN NEW;
    END IF;
    IF NEW.name = 'two_person_rule' OR (TG_OP = 'UPDATE' AND OLD.name = 'two_person_rule') THEN
        RAISE EXCEPTION USING ERRCODE = 'insufficient_privilege',
            MESSAGE = 'two_person_rule is for the owner of encryption_settings to change';
    END IF;
    NEW.changed_at := now();
    NEW.changed_by := session_user;
    RETURN NEW;
END $$;
CREATE TABLE public.begun (
    id integer NOT NULL,
    secret text NOT NULL,
    other numeric(12,2) DEFAULT 1,
    secret_encrypted text,
    secret_search character varying(64),
    other_encrypted text
);
CREATE TABLE public.dropped (
    id integer NOT NULL,
    secret_encrypted text NOT NULL,
    secret_search character varying(64),
    other_encrypted text
);
CREATE TABLE public.encryption_approvals (
    id bigint NOT NULL,
    table_name text NOT NULL,
    approver text NOT NULL,
    database_role text DEFAULT SESSION_USER NOT NULL,
    reason text NOT NULL,
    approved_at timestamp with time zone DEFAULT now() NOT NULL,
    expires_at timestamp with time zone NOT NULL,
    definition text NOT NULL,
    catalogue_entry text NOT NULL,
    key_check text NOT NULL,
    verified_at timestamp with time zone NOT NULL,
    backup_id bigint NOT NULL,
    run_id text,
    consumed_at timestamp with time zone,
    consumed_by text,
    revoked_at timestamp with time zone,
    revoked_by text
);
ALTER TABLE public.encryption_approvals ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME public.encryption_approvals_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);
CREATE TABLE public.encryption_audit_log (
    id bigint NOT NULL,
    at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    database_role text DEFAULT SESSION_USER NOT NULL,
    actor text NOT NULL,
    run_id text,
    table_name text,
    action text NOT NULL,
    details jsonb DEFAULT '{}'::jsonb NOT NULL
);
ALTER TABLE public.encryption_audit_log ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME public.encryption_audit_log_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);
CREATE TABLE public.encryption_backups (
    id bigint NOT NULL,
    taken_at timestamp with time zone NOT NULL,
    location text NOT NULL,
    bytes bigint NOT NULL,
    sha256 text NOT NULL,
    recipient text NOT NULL,
    listed_entries integer NOT NULL,
    verified_at timestamp with time zone NOT NULL,
    tables text[] NOT NULL,
    run_id text,
    drilled_at timestamp with time zone,
    drill jsonb,
    uploaded_at timestamp with time zone,
    uploaded_to text
);
ALTER TABLE public.encryption_backups ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME public.encryption_backups_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);
CREATE TABLE public.encryption_definitions (
    id bigint NOT NULL,
    table_name text NOT NULL,
    saved_at timestamp with time zone DEFAULT now() NOT NULL,
    definition jsonb NOT NULL,
    restored_at timestamp with time zone
);
ALTER TABLE public.encryption_definitions ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME public.encryption_definitions_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);
CREATE TABLE public.encryption_key_checks (
    key_version integer NOT NULL,
    check_value text NOT NULL,
    first_used_at timestamp with time zone DEFAULT now() NOT NULL
);
CREATE TABLE public.encryption_key_usage (
    context text NOT NULL,
    key_version integer NOT NULL,
    source text NOT NULL,
    messages bigint NOT NULL,
    first_used_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    updated_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    CONSTRAINT encryption_key_usage_messages_check CHECK ((messages >= 0)),
    CONSTRAINT encryption_key_usage_source_check CHECK ((source = ANY (ARRAY['engine'::text, 'application'::text])))
);
CREATE TABLE public.encryption_key_versions (
    key_version integer NOT NULL,
    state text NOT NULL,
    since timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    changed_by text NOT NULL,
    run_id text,
    counted_at timestamp with time zone,
    found jsonb,
    CONSTRAINT encryption_key_versions_state_check CHECK ((state = ANY (ARRAY['current'::text, 'readable'::text, 'retired'::text])))
);
CREATE TABLE public.encryption_migrations (
    table_name text NOT NULL,
    column_name text NOT NULL,
    status text DEFAULT 'pending'::text NOT NULL,
    started_at timestamp with time zone,
    completed_at timestamp with time zone,
    records_processed bigint DEFAULT 0 NOT NULL,
    error_message text,
    CONSTRAINT encryption_migrations_status_check CHECK ((status = ANY (ARRAY['pending'::text, 'in_progress'::text, 'completed'::text, 'failed'::text])))
);
CREATE TABLE public.encryption_quarantine (
    table_name text NOT NULL,
    batch_range integer NOT NULL,
    key text[] NOT NULL,
    reason text NOT NULL,
    since timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    run_id text,
    step text DEFAULT 'backfill'::text NOT NULL
);
CREATE TABLE public.encryption_ranges (
    table_name text NOT NULL,
    batch_range integer NOT NULL,
    lower_key text[],
    upper_key text[],
    status text DEFAULT 'pending'::text NOT NULL,
    "position" text[],
    rows_processed bigint DEFAULT 0 NOT NULL,
    values_processed bigint DEFAULT 0 NOT NULL,
    started_at timestamp with time zone,
    updated_at timestamp with time zone,
    completed_at timestamp with time zone,
    waiting_for text,
    error_message text,
    CONSTRAINT encryption_ranges_status_check CHECK ((status = ANY (ARRAY['pending'::text, 'in_progress'::text, 'completed'::text, 'failed'::text])))
);
CREATE TABLE public.encryption_rotation_ranges (
    table_name text NOT NULL,
    batch_range integer NOT NULL,
    to_version integer NOT NULL,
    status text DEFAULT 'pending'::text NOT NULL,
    "position" text[],
    rows_processed bigint DEFAULT 0 NOT NULL,
    values_processed bigint DEFAULT 0 NOT NULL,
    started_at timestamp with time zone,
    updated_at timestamp with time zone,
    completed_at timestamp with time zone,
    waiting_for text,
    error_message text,
    CONSTRAINT encryption_rotation_ranges_status_check CHECK ((status = ANY (ARRAY['pending'::text, 'in_progress'::text, 'completed'::text, 'failed'::text])))
);
CREATE TABLE public.encryption_row_counts (
    table_name text NOT NULL,
    counted_at timestamp with time zone NOT NULL,
    since xid8 NOT NULL,
    row_count bigint NOT NULL,
    verified_count bigint NOT NULL,
    missing_count bigint NOT NULL,
    run_id text
);
CREATE TABLE public.encryption_settings (
    name text NOT NULL,
    value jsonb NOT NULL,
    changed_at timestamp with time zone DEFAULT now() NOT NULL,
    changed_by text DEFAULT SESSION_USER NOT NULL
);
CREATE TABLE public.encryption_tables (
    table_name text NOT NULL,
    authority text DEFAULT 'plaintext'::text NOT NULL,
    stage text DEFAULT 'columns'::text NOT NULL,
    set_aside jsonb DEFAULT '{}'::jsonb NOT NULL,
    changed_at timestamp with time zone DEFAULT now() NOT NULL,
    CONSTRAINT encryption_tables_authority_check CHECK ((authority = ANY (ARRAY['plaintext'::text, 'ciphertext'::text]))),
    CONSTRAINT encryption_tables_stage_check CHECK ((stage = ANY (ARRAY['columns'::text, 'dropped'::text, 'restoring'::text])))
);
CREATE TABLE public.encryption_tuning (
    relation regclass NOT NULL,
    table_name text NOT NULL,
    options text[] NOT NULL,
    toast_options text[] NOT NULL,
    since timestamp with time zone DEFAULT clock_timestamp() NOT NULL
);
CREATE TABLE public.encryption_tuning_holders (
    holder uuid NOT NULL,
    table_name text NOT NULL,
    pid integer DEFAULT pg_backend_pid() NOT NULL,
    actor text NOT NULL,
    run_id text,
    since timestamp with time zone DEFAULT clock_timestamp() NOT NULL
);
CREATE TABLE public.encryption_verifications (
    table_name text NOT NULL,
    batch_range integer NOT NULL,
    verified_at timestamp with time zone NOT NULL,
    definition text NOT NULL,
    key_check text NOT NULL,
    row_count bigint NOT NULL,
    columns jsonb NOT NULL,
    offenders jsonb NOT NULL,
    run_id text,
    since xid8
);
CREATE TABLE public.half (
    id integer NOT NULL,
    secret text NOT NULL,
    other numeric(12,2) DEFAULT 1,
    secret_encrypted text,
    secret_search character varying(64),
    other_encrypted text
);
CREATE TABLE public.switched (
    id integer NOT NULL,
    secret text,
    other numeric(12,2),
    secret_encrypted text,
    secret_search character varying(64),
    other_encrypted text,
    CONSTRAINT secret_encryption_present CHECK (((secret IS NOT NULL) OR (secret_encrypted IS NOT NULL)))
);
CREATE VIEW public.v_dropped WITH (security_invoker='true') AS
 SELECT id,
    secret_encrypted AS secret,
    other_encrypted AS other,
    secret_search
   FROM public.dropped t;
COMMENT ON VIEW public.v_dropped IS 'alphapulse_encryption: compatibility view 979ae351c9739d7dc3d139141e7481cf1fb3986ac2f601a5c541082230af208e';
CREATE VIEW public.v_dropped_safe WITH (security_invoker='true') AS
 SELECT id
   FROM public.dropped t;
COMMENT ON VIEW public.v_dropped_safe IS 'alphapulse_encryption: compatibility view 309f24363c2ea7f9b1d8b20217be030a0efe75d2e7efa3b1face844510e95d99';
CREATE VIEW public.v_switched WITH (security_invoker='true') AS
 SELECT id,
    secret_encrypted AS secret,
    other_encrypted AS other,
    secret_search
   FROM public.switched t;
COMMENT ON VIEW public.v_switched IS 'alphapulse_encryption: compatibility view 979ae351c9739d7dc3d139141e7481cf1fb3986ac2f601a5c541082230af208e';
CREATE VIEW public.v_switched_safe WITH (security_invoker='true') AS
 SELECT id
   FROM public.switched t;
COMMENT ON VIEW public.v_switched_safe IS 'alphapulse_encryption: compatibility view 309f24363c2ea7f9b1d8b20217be030a0efe75d2e7efa3b1face844510e95d99';
INSERT INTO public.begun VALUES (1, 'begun 1', 1.50, NULL, NULL, NULL);
INSERT INTO public.begun VALUES (2, 'begun 2', 3.00, NULL, NULL, NULL);
INSERT INTO public.begun VALUES (3, 'begun 3', 4.50, NULL, NULL, NULL);
INSERT INTO public.begun VALUES (4, 'begun 4', 6.00, NULL, NULL, NULL);
INSERT INTO public.begun VALUES (5, 'begun 5', 7.50, NULL, NULL, NULL);
INSERT INTO public.begun VALUES (6, 'begun 6', 9.00, NULL, NULL, NULL);
INSERT INTO public.begun VALUES (7, 'begun 7', 10.50, NULL, NULL, NULL);
INSERT INTO public.begun VALUES (8, 'begun 8', 12.00, NULL, NULL, NULL);
INSERT INTO public.dropped VALUES (1, '{"ciphertext": "KiNDs1iNoFWMHb//ZarIaBGnfVHSbzNA83J7LcPfFOQ2GbbQyg==", "key_version": 1, "context": "test_search", "algorithm": "AES-256-GCM"}', '+KJY+yHbcTmfrN1XHQMnAW7d1Jvjaa3s8Rp6oNSuO/g=', '{"ciphertext": "O5USoXvWIQ853IEspk5vvHyciqLo/6I1N5AwWaazYf8=", "key_version": 1, "context": "test_context", "algorithm": "AES-256-GCM"}');
INSERT INTO public.dropped VALUES (2, '{"ciphertext": "VyMrluzqCoXaURFCITgyUEXR63Z388j7jucoopgigyBSmxSqqw==", "key_version": 1, "context": "test_search", "algorithm": "AES-256-GCM"}', 'PCgMcuOzrV3NRFwAyctAxODyEC8vaHnstLad+1xtNFo=', '{"ciphertext": "0XjWRv39b/epG/s/jXDyFw6PyOdDxKYLdly3U38HpEo=", "key_version": 1, "context": "test_context", "algorithm": "AES-256-GCM"}');
INSERT INTO public.dropped VALUES (3, '{"ciphertext": "KK06N0dyYR1XYN6Eco/aQttYd5O2eOKbumpct8UHxXodILx7NA==", "key_version": 1, "context": "test_search", "algorithm": "AES-256-GCM"}', 'DlpbLR9cIeR7W6xq79vENydKdby0Gdf89+6Oy0YEWr4=', '{"ciphertext": "KzgJK4m+yiflb99aYOZ3iUEsXnmAK5+JKbiG8ffIJjo=", "key_version": 1, "context": "test_context", "algorithm": "AES-256-GCM"}');
INSERT INTO public.dropped VALUES (4, '{"ciphertext": "MKzVgzllZyyjkv1Wk3nafJG8l1PpBVhAhmTHdrkh7w0iQzkwvA==", "key_version": 1, "context": "test_search", "algorithm": "AES-256-GCM"}', 'D7kfmDJomIUS64U9dEwunT3k17a/7cadYjZQ41/LTy0=', '{"ciphertext": "nqUITD/LuqgcGqBUirGSJ20rQ8Xbq3xHC6FQ5Bzpm0c=", "key_version": 1, "context": "test_context", "algorithm": "AES-256-GCM"}');
INSERT INTO public.dropped VALUES (5, '{"ciphertext": "YS0FkzkVbsZTtSZ1gBS44UUk0JaKwNgSqdsTVDR8ZdvX5Zy16w==", "key_version": 1, "context": "test_search", "algorithm": "AES-256-GCM"}', 'UDLD5y2y1u0cYClxdKyUP7NK5WDoL48pKI3kU/TFn9M=', '{"ciphertext": "mNZGswKGVwPCvayfL160VN/goFTuWkwNe0h6LmYvS7M=", "key_version": 1, "context": "test_context", "algorithm": "AES-256-GCM"}');
INSERT INTO public.dropped VALUES (6, '{"ciphertext": "LzK0+iRIVH2mCx8T+En1aZrE6QlusIBS+k6UhuWS7reKfK64bA==", "key_version": 1, "context": "test_search", "algorithm": "AES-256-GCM"}', 'CXxsM6ecRyvvuJmhwgVp8VdUq5pOmkUjGEO7D91UUhM=', '{"ciphertext": "WF5nD7tUhFkxSMqmeIo119HteBlaIxecCautJAqNWRk=", "key_version": 1, "context": "test_context", "algorithm": "AES-256-GCM"}');
INSERT INTO public.dropped VALUES (7, '{"ciphertext": "c4qVDd0p/jLusHQ++y2vFzxW2zvFTUxJovxAGpnHGfWoBGP5lw==", "key_version": 1, "context": "test_search", "algorithm": "AES-256-GCM"}', 'xxNdSOiUulE3MslhGdcXI9vMoHAiC0bpjAMfHaZ6HnU=', '{"ciphertext": "Cuwc7jwgFXS/WPp00lmYUf7mPJ3eIkCCdS1Gyx/Q6EL/", "key_version": 1, "context": "test_context", "algorithm": "AES-256-GCM"}');
INSERT INTO public.dropped VALUES (8, '{"ciphertext": "IjKESMcJvVpzaL9EBj0vIqz/9ovdO/peq1hAdtdeRpsQv8bbcg==", "key_version": 1, "context": "test_search", "algorithm": "AES-256-GCM"}', 'p4j9Luj8CEJnpDUpb20eEt3Oa++JsrdhoKOzwZ/9cuE=', '{"ciphertext": "jlU6SCHvXgt4clGa0Xnzn5lqOPfLZ/DTYxhPN13Ijc4C", "key_version": 1, "context": "test_context", "algorithm": "AES-256-GCM"}');
INSERT INTO public.encryption_approvals OVERRIDING SYSTEM VALUE VALUES (2, 'dropped', 'Ada', 'postgres', 'it has served for a month', '2026-11-30 16:59:08.064452+00', '2026-12-01 16:59:08.064452+00', '71d4c2f9df74f51b3cbbacb1a9b33fba40607df6df6b7ef11e392a0dd77d9a50', '569bba85cc9f6cffff7af108ea80ed1d96e12c33cc26643fb1259fa3513aa951', 'Jm7jAxiu0cL9vJzYhfQAskyWsk+bQPHvZhawDXBqKgI=', '2026-11-30 16:59:06.56279+00', 1, 'run-7', '2026-11-30 16:59:08.51731+00', 'Grace', NULL, NULL);
INSERT INTO public.encryption_approvals OVERRIDING SYSTEM VALUE VALUES (1, 'switched', 'Ada', 'postgres', 'it has served for a month', '2026-11-30 16:59:07.828037+00', '2026-12-01 16:59:07.828037+00', '5d74565577fded6496a894be3172843cf483ba058aacb5a187923cf29fbaf3be', '34e9b7d3881c3685a2c0ae3a467ebd2f2f8e4ca4174f1bfea0bb47ac11bb9b6a', 'Jm7jAxiu0cL9vJzYhfQAskyWsk+bQPHvZhawDXBqKgI=', '2026-11-30 16:59:04.867515+00', 1, 'run-7', NULL, NULL, '2026-11-30 16:59:08.578192+00', 'Ada');
INSERT INTO public.encryption_audit_log OVERRIDING SYSTEM VALUE VALUES (1, '2026-11-30 16:59:00.93563+00', 'postgres', 'tests', 'run-7', 'begun', 'add_columns', '{"columns": ["secret_encrypted", "secret_search", "other_encrypted"]}');
INSERT INTO public.encryption_audit_log OVERRIDING SYSTEM VALUE VALUES (2, '2026-11-30 16:59:01.050315+00', 'postgres', 'tests', 'run-7', 'begun', 'guard', '{"authority": "plaintext"}');
INSERT INTO public.encryption_audit_log OVERRIDING SYSTEM VALUE VALUES (3, '2026-11-30 16:59:01.238862+00', 'postgres', 'tests', 'run-7', 'half', 'add_columns', '{"columns": ["secret_encrypted", "secret_search", "other_encrypted"]}');
INSERT INTO public.encryption_audit_log OVERRIDING SYSTEM VALUE VALUES (4, '2026-11-30 16:59:01.435351+00', 'postgres', 'tests', 'run-7', 'half', 'guard', '{"authority": "plaintext"}');
INSERT INTO public.encryption_audit_log OVERRIDING SYSTEM VALUE VALUES (5, '2026-11-30 16:59:01.752393+00', 'postgres', 'tests', 'run-7', 'switched', 'add_columns', '{"columns": ["secret_encrypted", "secret_search", "other_encrypted"]}');
INSERT INTO public.encryption_audit_log OVERRIDING SYSTEM VALUE VALUES (6, '2026-11-30 16:59:01.864833+00', 'postgres', 'tests', 'run-7', 'switched', 'guard', '{"authority": "plaintext"}');
INSERT INTO public.encryption_audit_log OVERRIDING SYSTEM VALUE VALUES (7, '2026-11-30 16:59:02.171089+00', 'postgres', 'tests', 'run-7', 'dropped', 'add_columns', '{"columns": ["secret_encrypted", "secret_search", "other_encrypted"]}');
INSERT INTO public.encryption_audit_log OVERRIDING SYSTEM VALUE VALUES (8, '2026-11-30 16:59:02.290488+00', 'postgres', 'tests', 'run-7', 'dropped', 'guard', '{"authority": "plaintext"}');
INSERT INTO public.encryption_audit_log OVERRIDING SYSTEM VALUE VALUES (9, '2026-11-30 16:59:03.079481+00', 'postgres', 'tests', 'run-7', 'half', 'backfill', '{"rows": 4, "values": 8, "batch_range": 0, "quarantined": 0}');
INSERT INTO public.encryption_audit_log OVERRIDING SYSTEM VALUE VALUES (10, '2026-11-30 16:59:03.413266+00', 'postgres', 'tests', 'run-7', 'switched', 'backfill', '{"rows": 4, "values": 8, "batch_range": 0, "quarantined": 0}');
INSERT INTO public.encryption_audit_log OVERRIDING SYSTEM VALUE VALUES (11, '2026-11-30 16:59:03.782944+00', 'postgres', 'tests', 'run-7', 'switched', 'backfill', '{"rows": 4, "values": 8, "batch_range": 1, "quarantined": 0}');
INSERT INTO public.encryption_audit_log OVERRIDING SYSTEM VALUE VALUES (12, '2026-11-30 16:59:03.930731+00', 'postgres', 'tests', 'run-7', 'switched', 'create_index', '{"index": "idx_switched_secret", "unique": true}');
INSERT INTO public.encryption_audit_log OVERRIDING SYSTEM VALUE VALUES (13, '2026-11-30 16:59:03.977519+00', 'postgres', 'tests', 'run-7', 'switched', 'create_index', '{"index": "switched_encryption_pending", "unique": false}');
INSERT INTO public.encryption_audit_log OVERRIDING SYSTEM VALUE VALUES (14, '2026-11-30 16:59:03.985328+00', 'postgres', 'tests', 'run-7', 'switched', 'analyze', '{}');
INSERT INTO public.encryption_audit_log OVERRIDING SYSTEM VALUE VALUES (15, '2026-11-30 16:59:04.368536+00', 'postgres', 'tests', 'run-7', 'switched', 'create_view', '{"view": "v_switched", "granted": []}');
INSERT INTO public.encryption_audit_log OVERRIDING SYSTEM VALUE VALUES (16, '2026-11-30 16:59:04.402489+00', 'postgres', 'tests', 'run-7', 'switched', 'create_view', '{"view": "v_switched_safe", "granted": []}');
INSERT INTO public.encryption_audit_log OVERRIDING SYSTEM VALUE VALUES (17, '2026-11-30 16:59:04.607035+00', 'postgres', 'tests', 'run-7', 'switched', 'add_check', '{"constraint": "secret_encryption_present"}');
INSERT INTO public.encryption_audit_log OVERRIDING SYSTEM VALUE VALUES (18, '2026-11-30 16:59:04.767631+00', 'postgres', 'tests', 'run-7', 'switched', 'guard', '{"authority": "ciphertext"}');
INSERT INTO public.encryption_audit_log OVERRIDING SYSTEM VALUE VALUES (19, '2026-11-30 16:59:04.773554+00', 'postgres', 'tests', 'run-7', 'switched', 'switch_to_ciphertext', '{"defaults": {"other": "1"}, "not_null": ["secret"]}');
INSERT INTO public.encryption_audit_log OVERRIDING SYSTEM VALUE VALUES (20, '2026-11-30 16:59:05.326287+00', 'postgres', 'tests', 'run-7', 'dropped', 'backfill', '{"rows": 4, "values": 8, "batch_range": 0, "quarantined": 0}');
INSERT INTO public.encryption_audit_log OVERRIDING SYSTEM VALUE VALUES (21, '2026-11-30 16:59:05.60824+00', 'postgres', 'tests', 'run-7', 'dropped', 'backfill', '{"rows": 4, "values": 8, "batch_range": 1, "quarantined": 0}');
INSERT INTO public.encryption_audit_log OVERRIDING SYSTEM VALUE VALUES (22, '2026-11-30 16:59:05.737652+00', 'postgres', 'tests', 'run-7', 'dropped', 'create_index', '{"index": "idx_dropped_secret", "unique": true}');
INSERT INTO public.encryption_audit_log OVERRIDING SYSTEM VALUE VALUES (23, '2026-11-30 16:59:05.763417+00', 'postgres', 'tests', 'run-7', 'dropped', 'create_index', '{"index": "dropped_encryption_pending", "unique": false}');
INSERT INTO public.encryption_audit_log OVERRIDING SYSTEM VALUE VALUES (24, '2026-11-30 16:59:05.769815+00', 'postgres', 'tests', 'run-7', 'dropped', 'analyze', '{}');
INSERT INTO public.encryption_audit_log OVERRIDING SYSTEM VALUE VALUES (25, '2026-11-30 16:59:06.113034+00', 'postgres', 'tests', 'run-7', 'dropped', 'create_view', '{"view": "v_dropped", "granted": []}');
INSERT INTO public.encryption_audit_log OVERRIDING SYSTEM VALUE VALUES (26, '2026-11-30 16:59:06.156737+00', 'postgres', 'tests', 'run-7', 'dropped', 'create_view', '{"view": "v_dropped_safe", "granted": []}');
INSERT INTO public.encryption_audit_log OVERRIDING SYSTEM VALUE VALUES (27, '2026-11-30 16:59:06.344023+00', 'postgres', 'tests', 'run-7', 'dropped', 'add_check', '{"constraint": "secret_encryption_present"}');
INSERT INTO public.encryption_audit_log OVERRIDING SYSTEM VALUE VALUES (28, '2026-11-30 16:59:06.460566+00', 'postgres', 'tests', 'run-7', 'dropped', 'guard', '{"authority": "ciphertext"}');
INSERT INTO public.encryption_audit_log OVERRIDING SYSTEM VALUE VALUES (29, '2026-11-30 16:59:06.463644+00', 'postgres', 'tests', 'run-7', 'dropped', 'switch_to_ciphertext', '{"defaults": {"other": "1"}, "not_null": ["secret"]}');
INSERT INTO public.encryption_audit_log OVERRIDING SYSTEM VALUE VALUES (30, '2026-11-30 16:59:07.481913+00', 'postgres', 'tests', 'run-7', NULL, 'backup', '{"bytes": 97285, "backup": 1, "sha256": "5928c82b53ef451c41149cc6073023e83451a3a67f19726ce6d5e0d9b85dbd8f", "tables": ["switched", "dropped"], "drilled": false}');
INSERT INTO public.encryption_audit_log OVERRIDING SYSTEM VALUE VALUES (31, '2026-11-30 16:59:07.875807+00', 'postgres', 'tests', 'run-7', 'switched', 'approve_drop', '{"backup": 1, "reason": "it has served for a month", "approval": 1, "approver": "Ada", "expires_at": "2026-12-01 16:59:07.828037+00:00"}');
INSERT INTO public.encryption_audit_log OVERRIDING SYSTEM VALUE VALUES (32, '2026-11-30 16:59:08.094884+00', 'postgres', 'tests', 'run-7', 'dropped', 'approve_drop', '{"backup": 1, "reason": "it has served for a month", "approval": 2, "approver": "Ada", "expires_at": "2026-12-01 16:59:08.064452+00:00"}');
INSERT INTO public.encryption_audit_log OVERRIDING SYSTEM VALUE VALUES (33, '2026-11-30 16:59:08.524608+00', 'postgres', 'tests', 'run-7', 'dropped', 'drop_plaintext', '{"backup": 1, "columns": ["secret", "other"], "approval": 2, "approver": "Ada", "operator": "Grace", "definition": 1, "two_person_rule": "names"}');
INSERT INTO public.encryption_audit_log OVERRIDING SYSTEM VALUE VALUES (34, '2026-11-30 16:59:08.557639+00', 'postgres', 'tests', 'run-7', 'dropped', 'set_not_null', '{"column": "secret_encrypted"}');
INSERT INTO public.encryption_audit_log OVERRIDING SYSTEM VALUE VALUES (35, '2026-11-30 16:59:08.582167+00', 'postgres', 'tests', 'run-7', NULL, 'revoke_approval', '{"reason": "not yet", "approval": 1, "of_table": "switched", "operator": "Ada"}');
INSERT INTO public.encryption_audit_log OVERRIDING SYSTEM VALUE VALUES (36, '2026-11-30 16:59:08.612883+00', 'postgres', 'tests', 'run-7', NULL, 'change_settings', '{"settings": {"batch_size": 500}}');
INSERT INTO public.encryption_backups OVERRIDING SYSTEM VALUE VALUES (1, '2026-11-30 16:59:07.010782+00', '/var/backups/begun_before.dump.age', 97285, '5928c82b53ef451c41149cc6073023e83451a3a67f19726ce6d5e0d9b85dbd8f', 'age127c9vt3gvkysuw3nlcawk7hllrl8t63phr0z08t3lety05p4dgks2n8pnh', 142, '2026-11-30 16:59:07.479707+00', '{switched,dropped}', 'run-7', NULL, NULL, NULL, NULL);
INSERT INTO public.encryption_definitions OVERRIDING SYSTEM VALUE VALUES (1, 'dropped', '2026-11-30 16:59:08.36175+00', '{"columns": [{"name": "secret", "type": "text", "grants": [], "comment": null, "default": null, "options": [], "storage": null, "not_null": {"name": "dropped_secret_not_null", "comment": null, "definition": "NOT NULL secret"}, "collation": null, "sequences": [], "statistics": null, "compression": null, "encrypted_was_required": false}, {"name": "other", "type": "numeric(12,2)", "grants": [], "comment": null, "default": "1", "options": [], "storage": null, "not_null": null, "collation": null, "sequences": [], "statistics": null, "compression": null, "encrypted_was_required": false}], "indexes": [], "statistics": [], "constraints": [{"kind": "u", "name": "dropped_secret_key", "index": {"name": "dropped_secret_key", "comment": null, "clustered": false, "definition": "CREATE UNIQUE INDEX dropped_secret_key ON public.dropped USING btree (secret)", "statistics": {}, "tablespace": null}, "comment": null, "deferred": false, "validated": true, "deferrable": false, "definition": "UNIQUE (secret)"}]}', NULL);
INSERT INTO public.encryption_key_checks VALUES (1, 'Jm7jAxiu0cL9vJzYhfQAskyWsk+bQPHvZhawDXBqKgI=', '2026-11-30 16:59:00.673955+00');
INSERT INTO public.encryption_key_usage VALUES ('test_search', 1, 'engine', 20, '2026-11-30 16:59:02.696834+00', '2026-11-30 16:59:05.569793+00');
INSERT INTO public.encryption_key_usage VALUES ('test_context', 1, 'engine', 20, '2026-11-30 16:59:02.837908+00', '2026-11-30 16:59:05.576051+00');
INSERT INTO public.encryption_key_usage VALUES ('test_context', 1, 'application', 77, '2026-11-30 16:59:08.628952+00', '2026-11-30 16:59:08.628952+00');
INSERT INTO public.encryption_key_versions VALUES (1, 'current', '2026-11-30 16:59:00.875981+00', 'first use', NULL, NULL, NULL);
INSERT INTO public.encryption_migrations VALUES ('begun', 'secret', 'pending', NULL, NULL, 0, NULL);
INSERT INTO public.encryption_migrations VALUES ('begun', 'other', 'pending', NULL, NULL, 0, NULL);
INSERT INTO public.encryption_migrations VALUES ('half', 'secret', 'in_progress', '2026-11-30 16:59:02.532323+00', NULL, 4, NULL);
INSERT INTO public.encryption_migrations VALUES ('half', 'other', 'in_progress', '2026-11-30 16:59:02.532293+00', NULL, 4, NULL);
INSERT INTO public.encryption_migrations VALUES ('switched', 'other', 'completed', '2026-11-30 16:59:03.279445+00', '2026-11-30 16:59:03.778236+00', 8, NULL);
INSERT INTO public.encryption_migrations VALUES ('switched', 'secret', 'completed', '2026-11-30 16:59:03.279465+00', '2026-11-30 16:59:03.778254+00', 8, NULL);
INSERT INTO public.encryption_migrations VALUES ('dropped', 'other', 'completed', '2026-11-30 16:59:05.189349+00', '2026-11-30 16:59:05.606394+00', 8, NULL);
INSERT INTO public.encryption_migrations VALUES ('dropped', 'secret', 'completed', '2026-11-30 16:59:05.18937+00', '2026-11-30 16:59:05.60642+00', 8, NULL);
INSERT INTO public.encryption_quarantine VALUES ('half', 1, '{8}', 'value too long', '2026-11-30 16:59:08.656553+00', NULL, 'backfill');
INSERT INTO public.encryption_ranges VALUES ('begun', 0, NULL, '{4}', 'pending', NULL, 0, 0, NULL, NULL, NULL, NULL, NULL);
INSERT INTO public.encryption_ranges VALUES ('begun', 1, '{4}', NULL, 'pending', NULL, 0, 0, NULL, NULL, NULL, NULL, NULL);
INSERT INTO public.encryption_ranges VALUES ('half', 1, '{4}', NULL, 'pending', NULL, 0, 0, NULL, NULL, NULL, NULL, NULL);
INSERT INTO public.encryption_ranges VALUES ('half', 0, NULL, '{4}', 'completed', NULL, 4, 8, '2026-11-30 16:59:02.526628+00', '2026-11-30 16:59:03.060264+00', '2026-11-30 16:59:03.060264+00', NULL, NULL);
INSERT INTO public.encryption_ranges VALUES ('switched', 0, NULL, '{4}', 'completed', NULL, 4, 8, '2026-11-30 16:59:03.275043+00', '2026-11-30 16:59:03.405818+00', '2026-11-30 16:59:03.405818+00', NULL, NULL);
INSERT INTO public.encryption_ranges VALUES ('switched', 1, '{4}', NULL, 'completed', NULL, 4, 8, '2026-11-30 16:59:03.617337+00', '2026-11-30 16:59:03.772662+00', '2026-11-30 16:59:03.772662+00', NULL, NULL);
INSERT INTO public.encryption_ranges VALUES ('dropped', 0, NULL, '{4}', 'completed', NULL, 4, 8, '2026-11-30 16:59:05.184001+00', '2026-11-30 16:59:05.321928+00', '2026-11-30 16:59:05.321928+00', NULL, NULL);
INSERT INTO public.encryption_ranges VALUES ('dropped', 1, '{4}', NULL, 'completed', NULL, 4, 8, '2026-11-30 16:59:05.486472+00', '2026-11-30 16:59:05.599035+00', '2026-11-30 16:59:05.599035+00', NULL, NULL);
INSERT INTO public.encryption_row_counts VALUES ('switched', '2026-11-30 16:59:07.762188+00', '812', 8, 8, 0, 'run-7');
INSERT INTO public.encryption_row_counts VALUES ('dropped', '2026-11-30 16:59:08.016991+00', '842', 8, 8, 0, 'run-7');
INSERT INTO public.encryption_settings VALUES ('batch_size', '500', '2026-11-30 16:59:08.611649+00', 'postgres');
INSERT INTO public.encryption_tables VALUES ('begun', 'plaintext', 'columns', '{}', '2026-11-30 16:59:00.896311+00');
INSERT INTO public.encryption_tables VALUES ('half', 'plaintext', 'columns', '{}', '2026-11-30 16:59:01.211639+00');
INSERT INTO public.encryption_tables VALUES ('switched', 'ciphertext', 'columns', '{"defaults": {"other": "1"}, "not_null": {"secret": {"name": "switched_secret_not_null", "comment": null, "definition": "NOT NULL secret"}}, "unguarded": false}', '2026-11-30 16:59:04.634801+00');
INSERT INTO public.encryption_tables VALUES ('dropped', 'ciphertext', 'dropped', '{}', '2026-11-30 16:59:08.36175+00');
INSERT INTO public.encryption_verifications VALUES ('switched', 0, '2026-11-30 16:59:04.867515+00', '8c19180107e735f271b56226e85ccd96562d44ad6551bd79cdee784c9e06a39c', 'Jm7jAxiu0cL9vJzYhfQAskyWsk+bQPHvZhawDXBqKgI=', 4, '{"other": {"empty": 0, "pending": 0, "matching": 4, "mismatched": 0, "quarantined": 0, "retired_key": 0, "undecryptable": 0, "token_mismatched": 0}, "secret": {"empty": 0, "pending": 0, "matching": 4, "mismatched": 0, "quarantined": 0, "retired_key": 0, "undecryptable": 0, "token_mismatched": 0}}', '[]', 'run-7', '812');
INSERT INTO public.encryption_verifications VALUES ('switched', 1, '2026-11-30 16:59:04.993645+00', '8c19180107e735f271b56226e85ccd96562d44ad6551bd79cdee784c9e06a39c', 'Jm7jAxiu0cL9vJzYhfQAskyWsk+bQPHvZhawDXBqKgI=', 4, '{"other": {"empty": 0, "pending": 0, "matching": 4, "mismatched": 0, "quarantined": 0, "retired_key": 0, "undecryptable": 0, "token_mismatched": 0}, "secret": {"empty": 0, "pending": 0, "matching": 4, "mismatched": 0, "quarantined": 0, "retired_key": 0, "undecryptable": 0, "token_mismatched": 0}}', '[]', 'run-7', '813');
INSERT INTO public.encryption_verifications VALUES ('dropped', 0, '2026-11-30 16:59:06.56279+00', '8b632ff090cd16e1c570264563705e0f73e9b4b0cd0039c9739c1015acb9f204', 'Jm7jAxiu0cL9vJzYhfQAskyWsk+bQPHvZhawDXBqKgI=', 4, '{"other": {"empty": 0, "pending": 0, "matching": 4, "mismatched": 0, "quarantined": 0, "retired_key": 0, "undecryptable": 0, "token_mismatched": 0}, "secret": {"empty": 0, "pending": 0, "matching": 4, "mismatched": 0, "quarantined": 0, "retired_key": 0, "undecryptable": 0, "token_mismatched": 0}}', '[]', 'run-7', '842');
INSERT INTO public.encryption_verifications VALUES ('dropped', 1, '2026-11-30 16:59:06.686806+00', '8b632ff090cd16e1c570264563705e0f73e9b4b0cd0039c9739c1015acb9f204', 'Jm7jAxiu0cL9vJzYhfQAskyWsk+bQPHvZhawDXBqKgI=', 4, '{"other": {"empty": 0, "pending": 0, "matching": 4, "mismatched": 0, "quarantined": 0, "retired_key": 0, "undecryptable": 0, "token_mismatched": 0}, "secret": {"empty": 0, "pending": 0, "matching": 4, "mismatched": 0, "quarantined": 0, "retired_key": 0, "undecryptable": 0, "token_mismatched": 0}}', '[]', 'run-7', '843');
INSERT INTO public.half VALUES (5, 'half 5', 7.50, NULL, NULL, NULL);
INSERT INTO public.half VALUES (6, 'half 6', 9.00, NULL, NULL, NULL);
INSERT INTO public.half VALUES (7, 'half 7', 10.50, NULL, NULL, NULL);
INSERT INTO public.half VALUES (8, 'half 8', 12.00, NULL, NULL, NULL);
INSERT INTO public.half VALUES (1, 'half 1', 1.50, '{"ciphertext": "st6/kMT+MngJiqsw62Yys2HbtQLB03b+Ugx/3G+Dc+tu5Q==", "key_version": 1, "context": "test_search", "algorithm": "AES-256-GCM"}', 'Qqu/3p4E+VktxBejrSrGSmKJldhNMT9gVgEgN2omhLM=', '{"ciphertext": "fjSj8AWoM3OXKiB4HCex1ET1Sva6keFmdDZnNoTer98=", "key_version": 1, "context": "test_context", "algorithm": "AES-256-GCM"}');
INSERT INTO public.half VALUES (2, 'half 2', 3.00, '{"ciphertext": "xHji0miBhaBhyMtwGoEByEuXjQc4IdBZUO8KwH6DBY8+Wg==", "key_version": 1, "context": "test_search", "algorithm": "AES-256-GCM"}', 'WhWkmcUJbRcW8Jf0KIb8JQXR42/Zmnm4oqw3SVi2lWY=', '{"ciphertext": "Xpl/csIzOir8fEUxn1epY36FKIWwrtacVgHh9KtJ/vs=", "key_version": 1, "context": "test_context", "algorithm": "AES-256-GCM"}');
INSERT INTO public.half VALUES (3, 'half 3', 4.50, '{"ciphertext": "x2P+O6+CH8rZ1ZKKA/8U52pkXKgvh51/wOdHtv1OibBAqw==", "key_version": 1, "context": "test_search", "algorithm": "AES-256-GCM"}', 'JshQ/chMlxHEyX+CbGxNH4jFRJSMHZsBiGPByG3mOlo=', '{"ciphertext": "jjtzlDxOZfj+FSqqZgcvWmXA51sL4Hmb2phxN2eeNIc=", "key_version": 1, "context": "test_context", "algorithm": "AES-256-GCM"}');
INSERT INTO public.half VALUES (4, 'half 4', 6.00, '{"ciphertext": "MiykqZzAvrYT4bRDXp6CP76V2JPQ4LVTkk5D4EZg0dd7mQ==", "key_version": 1, "context": "test_search", "algorithm": "AES-256-GCM"}', 'rUmG6KmM/WDsNL9p/VX0zZrDnB+M8YLOCpBzZS4rINw=', '{"ciphertext": "JRR1QR9+yF4tx6i8mzWYw0IaJsUbOeeKneJ6Y5RRxaQ=", "key_version": 1, "context": "test_context", "algorithm": "AES-256-GCM"}');
INSERT INTO public.switched VALUES (1, 'switched 1', 1.50, '{"ciphertext": "SZRN+AfYztrFvKaTzCgz9AuXNd6n4eBV6iVObpYsKyohGsUABgc=", "key_version": 1, "context": "test_search", "algorithm": "AES-256-GCM"}', 'uz1l9W1WdmLkTbqy24JNTbl4znPxmS8qshIKzH3P2Qc=', '{"ciphertext": "F0fGIg6uS9db5yXFgfSZbXe1JJZmT6Ey57dBdqGb0nk=", "key_version": 1, "context": "test_context", "algorithm": "AES-256-GCM"}');
INSERT INTO public.switched VALUES (2, 'switched 2', 3.00, '{"ciphertext": "sl9Kv3vzZhtQVlIP5XudZqXBx3ujyBmOqBC5apAWLwCeLufbSM8=", "key_version": 1, "context": "test_search", "algorithm": "AES-256-GCM"}', 'h2MWJ5d0rApUz9pZnO0nzv2TINdsobyJPpk87yGlM5U=', '{"ciphertext": "8duCJCKPAEZHWE8u/JJi41mkwasWfIatb6RWxwAJQ50=", "key_version": 1, "context": "test_context", "algorithm": "AES-256-GCM"}');
INSERT INTO public.switched VALUES (3, 'switched 3', 4.50, '{"ciphertext": "5TfHAeQ6AEGmiNmfuHxrUVBYcUbrATHhJ18F2iq4YDVFEiWXgIo=", "key_version": 1, "context": "test_search", "algorithm": "AES-256-GCM"}', 'UdFZP1NsSjh0xjWm90UEcSqMixd4Nw0Dd5x1NQFOnmQ=', '{"ciphertext": "xyqDNvmdytR05+YorLBPxZwdAHBIMgVgzk9RnnIChIQ=", "key_version": 1, "context": "test_context", "algorithm": "AES-256-GCM"}');
INSERT INTO public.switched VALUES (4, 'switched 4', 6.00, '{"ciphertext": "5gepJH7bWpP8qFb/ZndqrW0ZYsPVG96epVbm2TM9u11OpMad2+Q=", "key_version": 1, "context": "test_search", "algorithm": "AES-256-GCM"}', 'gikffBmpY30ciUhhJCeHNNt+EIyQWkNfoxBH33EGwKE=', '{"ciphertext": "fNLezScrrqu9Tu0ret7jclEBDKzbGVJQmFHB3vNMib4=", "key_version": 1, "context": "test_context", "algorithm": "AES-256-GCM"}');
INSERT INTO public.switched VALUES (5, 'switched 5', 7.50, '{"ciphertext": "bdx0do1rsh4KUYw/f5JmJKBCUjXDh9tqO38I9wbz2NkFjfJS/28=", "key_version": 1, "context": "test_search", "algorithm": "AES-256-GCM"}', '1yTaxjuDex9VqE/sdwJ4AYWVEb1Mau/5xKi6Y2xjv9E=', '{"ciphertext": "rjWwO6KX0xl6ZHCsP7VkdMdeAeL/pdoo7u8kxEXRcjg=", "key_version": 1, "context": "test_context", "algorithm": "AES-256-GCM"}');
INSERT INTO public.switched VALUES (6, 'switched 6', 9.00, '{"ciphertext": "3hVf5Au+ewjmbA+Z7eLyNsuVqHrUyfBlz6Cg1aIY7XbiMA4F7Vw=", "key_version": 1, "context": "test_search", "algorithm": "AES-256-GCM"}', 'ob77bGiAo1B+L1IA90Flcz/TgJfqzEmZlWCHPHgcBRc=', '{"ciphertext": "ne0EEYwj/gch7U3RnRm15U8+pO+z7lCTh4XB18FHKJ8=", "key_version": 1, "context": "test_context", "algorithm": "AES-256-GCM"}');
INSERT INTO public.switched VALUES (7, 'switched 7', 10.50, '{"ciphertext": "PS6G89565RrZq7b4vBQZ2fDKRTthqITwpRZoV1yYfmHkQqeTiUE=", "key_version": 1, "context": "test_search", "algorithm": "AES-256-GCM"}', '3XA7DImCL480dSEbd3BRQKtbciLihyz791vVkGk7XxM=', '{"ciphertext": "nvv1NCdQrJwHUybvQYTR+2pk3KR5Ffs9D1nnd3mug7C0", "key_version": 1, "context": "test_context", "algorithm": "AES-256-GCM"}');
INSERT INTO public.switched VALUES (8, 'switched 8', 12.00, '{"ciphertext": "xcXyMFCqz4COUY4jUt7/ZWATrWJ9QVw/zUQx3UCN8N9xzD3EnLs=", "key_version": 1, "context": "test_search", "algorithm": "AES-256-GCM"}', 'doK1EWPcx7aTRCxtEIueRrIdhXvULkQQXXd+q1+vXUQ=', '{"ciphertext": "LNCdbjaTs378SuL2Z7qG1uWIO6aFivXwNri+MwRk9KN7", "key_version": 1, "context": "test_context", "algorithm": "AES-256-GCM"}');
SELECT pg_catalog.setval('public.encryption_approvals_id_seq', 2, true);
SELECT pg_catalog.setval('public.encryption_audit_log_id_seq', 36, true);
SELECT pg_catalog.setval('public.encryption_backups_id_seq', 1, true);
SELECT pg_catalog.setval('public.encryption_definitions_id_seq', 1, true);
ALTER TABLE ONLY public.begun
    ADD CONSTRAINT begun_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.begun
    ADD CONSTRAINT begun_secret_key UNIQUE (secret);
ALTER TABLE ONLY public.dropped
    ADD CONSTRAINT dropped_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.encryption_approvals
    ADD CONSTRAINT encryption_approvals_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.encryption_audit_log
    ADD CONSTRAINT encryption_audit_log_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.encryption_backups
    ADD CONSTRAINT encryption_backups_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.encryption_definitions
    ADD CONSTRAINT encryption_definitions_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.encryption_key_checks
    ADD CONSTRAINT encryption_key_checks_pkey PRIMARY KEY (key_version);
ALTER TABLE ONLY public.encryption_key_usage
    ADD CONSTRAINT encryption_key_usage_pkey PRIMARY KEY (context, key_version, source);
ALTER TABLE ONLY public.encryption_key_versions
    ADD CONSTRAINT encryption_key_versions_pkey PRIMARY KEY (key_version);
ALTER TABLE ONLY public.encryption_migrations
    ADD CONSTRAINT encryption_migrations_pkey PRIMARY KEY (table_name, column_name);
ALTER TABLE ONLY public.encryption_quarantine
    ADD CONSTRAINT encryption_quarantine_pkey PRIMARY KEY (table_name, key, step);
ALTER TABLE ONLY public.encryption_ranges
    ADD CONSTRAINT encryption_ranges_pkey PRIMARY KEY (table_name, batch_range);
ALTER TABLE ONLY public.encryption_rotation_ranges
    ADD CONSTRAINT encryption_rotation_ranges_pkey PRIMARY KEY (table_name, batch_range, to_version);
ALTER TABLE ONLY public.encryption_row_counts
    ADD CONSTRAINT encryption_row_counts_pkey PRIMARY KEY (table_name);
ALTER TABLE ONLY public.encryption_settings
    ADD CONSTRAINT encryption_settings_pkey PRIMARY KEY (name);
ALTER TABLE ONLY public.encryption_tables
    ADD CONSTRAINT encryption_tables_pkey PRIMARY KEY (table_name);
ALTER TABLE ONLY public.encryption_tuning_holders
    ADD CONSTRAINT encryption_tuning_holders_pkey PRIMARY KEY (holder);
ALTER TABLE ONLY public.encryption_tuning
    ADD CONSTRAINT encryption_tuning_pkey PRIMARY KEY (relation);
ALTER TABLE ONLY public.encryption_verifications
    ADD CONSTRAINT encryption_verifications_pkey PRIMARY KEY (table_name, batch_range);
ALTER TABLE ONLY public.half
    ADD CONSTRAINT half_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.half
    ADD CONSTRAINT half_secret_key UNIQUE (secret);
ALTER TABLE ONLY public.switched
    ADD CONSTRAINT switched_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.switched
    ADD CONSTRAINT switched_secret_key UNIQUE (secret);
CREATE UNIQUE INDEX encryption_one_current_key_version ON public.encryption_key_versions USING btree (state) WHERE (state = 'current'::text);
CREATE UNIQUE INDEX idx_dropped_secret ON public.dropped USING btree (secret_search);
CREATE UNIQUE INDEX idx_switched_secret ON public.switched USING btree (secret_search);
CREATE INDEX switched_encryption_pending ON public.switched USING btree (id) WHERE (((secret IS NOT NULL) AND ((secret_encrypted IS NULL) OR (secret_search IS NULL))) OR ((other IS NOT NULL) AND (other_encrypted IS NULL)));
COMMENT ON INDEX public.switched_encryption_pending IS 'alphapulse_encryption 8c19180107e735f271b56226e85ccd96562d44ad6551bd79cdee784c9e06a39c';
CREATE TRIGGER encryption_append_only BEFORE DELETE OR UPDATE OR TRUNCATE ON public.encryption_audit_log FOR EACH STATEMENT EXECUTE FUNCTION public.encryption_audit_is_append_only();
CREATE TRIGGER encryption_approval_is_final BEFORE UPDATE ON public.encryption_approvals FOR EACH ROW EXECUTE FUNCTION public.encryption_approval_is_final();
CREATE TRIGGER encryption_setting_is_allowed BEFORE INSERT OR UPDATE ON public.encryption_settings FOR EACH ROW EXECUTE FUNCTION public.encryption_setting_is_allowed();
CREATE TRIGGER zzz_encryption_guard_insert BEFORE INSERT ON public.begun FOR EACH ROW WHEN (((NOT ((NOT (current_setting('alphapulse_encryption.writer'::text, true) IS DISTINCT FROM 'engine'::text)) AND has_table_privilege(('public.encryption_ranges'::regclass)::oid, 'UPDATE'::text))) AND ((new.secret_encrypted IS NOT NULL) OR (new.secret_search IS NOT NULL) OR (new.other_encrypted IS NOT NULL)))) EXECUTE FUNCTION public.encryption_guard_begun('plaintext', '');
COMMENT ON TRIGGER zzz_encryption_guard_insert ON public.begun IS 'alphapulse_encryption e0604ce0d9212b94393765e2fabf4a0df90dce68865ed5f890020e3dd1018b3e';
CREATE TRIGGER zzz_encryption_guard_insert BEFORE INSERT ON public.half FOR EACH ROW WHEN (((NOT ((NOT (current_setting('alphapulse_encryption.writer'::text, true) IS DISTINCT FROM 'engine'::text)) AND has_table_privilege(('public.encryption_ranges'::regclass)::oid, 'UPDATE'::text))) AND ((new.secret_encrypted IS NOT NULL) OR (new.secret_search IS NOT NULL) OR (new.other_encrypted IS NOT NULL)))) EXECUTE FUNCTION public.encryption_guard_half('plaintext', '');
COMMENT ON TRIGGER zzz_encryption_guard_insert ON public.half IS 'alphapulse_encryption 4001d7b732bd49e6b69c7b9730d8cc5aa2dcb178163cac1474c272b5083f4012';
CREATE TRIGGER zzz_encryption_guard_insert BEFORE INSERT ON public.switched FOR EACH ROW WHEN (((NOT ((NOT (current_setting('alphapulse_encryption.writer'::text, true) IS DISTINCT FROM 'engine'::text)) AND has_table_privilege(('public.encryption_ranges'::regclass)::oid, 'UPDATE'::text))) AND ((new.secret_encrypted IS NOT NULL) OR (new.secret_search IS NOT NULL) OR (new.other_encrypted IS NOT NULL)))) EXECUTE FUNCTION public.encryption_guard_switched('ciphertext', '');
COMMENT ON TRIGGER zzz_encryption_guard_insert ON public.switched IS 'alphapulse_encryption a1453d87ad82f5d2fd64d2e1d59c9714f7408acd50a20042d526b15236c7c916';
CREATE TRIGGER zzz_encryption_guard_mention_0000 BEFORE UPDATE OF secret ON public.begun FOR EACH ROW WHEN (((old.secret_encrypted IS DISTINCT FROM new.secret_encrypted) AND record_image_eq(ROW(old.secret), ROW(new.secret)))) EXECUTE FUNCTION public.encryption_guard_begun('plaintext', '<0>');
COMMENT ON TRIGGER zzz_encryption_guard_mention_0000 ON public.begun IS 'alphapulse_encryption e0604ce0d9212b94393765e2fabf4a0df90dce68865ed5f890020e3dd1018b3e';
CREATE TRIGGER zzz_encryption_guard_mention_0000 BEFORE UPDATE OF secret ON public.half FOR EACH ROW WHEN (((old.secret_encrypted IS DISTINCT FROM new.secret_encrypted) AND record_image_eq(ROW(old.secret), ROW(new.secret)))) EXECUTE FUNCTION public.encryption_guard_half('plaintext', '<0>');
COMMENT ON TRIGGER zzz_encryption_guard_mention_0000 ON public.half IS 'alphapulse_encryption 4001d7b732bd49e6b69c7b9730d8cc5aa2dcb178163cac1474c272b5083f4012';
CREATE TRIGGER zzz_encryption_guard_mention_0000 BEFORE UPDATE OF secret ON public.switched FOR EACH ROW WHEN (((old.secret_encrypted IS DISTINCT FROM new.secret_encrypted) AND record_image_eq(ROW(old.secret), ROW(new.secret)))) EXECUTE FUNCTION public.encryption_guard_switched('ciphertext', '<0>');
COMMENT ON TRIGGER zzz_encryption_guard_mention_0000 ON public.switched IS 'alphapulse_encryption a1453d87ad82f5d2fd64d2e1d59c9714f7408acd50a20042d526b15236c7c916';
CREATE TRIGGER zzz_encryption_guard_mention_0001 BEFORE UPDATE OF other ON public.begun FOR EACH ROW WHEN (((old.other_encrypted IS DISTINCT FROM new.other_encrypted) AND record_image_eq(ROW(old.other), ROW(new.other)))) EXECUTE FUNCTION public.encryption_guard_begun('plaintext', '<1>');
COMMENT ON TRIGGER zzz_encryption_guard_mention_0001 ON public.begun IS 'alphapulse_encryption e0604ce0d9212b94393765e2fabf4a0df90dce68865ed5f890020e3dd1018b3e';
CREATE TRIGGER zzz_encryption_guard_mention_0001 BEFORE UPDATE OF other ON public.half FOR EACH ROW WHEN (((old.other_encrypted IS DISTINCT FROM new.other_encrypted) AND record_image_eq(ROW(old.other), ROW(new.other)))) EXECUTE FUNCTION public.encryption_guard_half('plaintext', '<1>');
COMMENT ON TRIGGER zzz_encryption_guard_mention_0001 ON public.half IS 'alphapulse_encryption 4001d7b732bd49e6b69c7b9730d8cc5aa2dcb178163cac1474c272b5083f4012';
CREATE TRIGGER zzz_encryption_guard_mention_0001 BEFORE UPDATE OF other ON public.switched FOR EACH ROW WHEN (((old.other_encrypted IS DISTINCT FROM new.other_encrypted) AND record_image_eq(ROW(old.other), ROW(new.other)))) EXECUTE FUNCTION public.encryption_guard_switched('ciphertext', '<1>');
COMMENT ON TRIGGER zzz_encryption_guard_mention_0001 ON public.switched IS 'alphapulse_encryption a1453d87ad82f5d2fd64d2e1d59c9714f7408acd50a20042d526b15236c7c916';
CREATE TRIGGER zzz_encryption_guard_update BEFORE UPDATE ON public.begun FOR EACH ROW WHEN (
        CASE
            WHEN ((NOT (current_setting('alphapulse_encryption.writer'::text, true) IS DISTINCT FROM 'engine'::text)) AND has_table_privilege(('public.encryption_ranges'::regclass)::oid, 'UPDATE'::text)) THEN record_image_ne(ROW(old.secret, old.other), ROW(new.secret, new.other))
            ELSE record_image_ne(ROW(old.secret, old.secret_encrypted, old.secret_search, old.other, old.other_encrypted), ROW(new.secret, new.secret_encrypted, new.secret_search, new.other, new.other_encrypted))
        END) EXECUTE FUNCTION public.encryption_guard_begun('plaintext', '');
COMMENT ON TRIGGER zzz_encryption_guard_update ON public.begun IS 'alphapulse_encryption e0604ce0d9212b94393765e2fabf4a0df90dce68865ed5f890020e3dd1018b3e';
CREATE TRIGGER zzz_encryption_guard_update BEFORE UPDATE ON public.half FOR EACH ROW WHEN (
        CASE
            WHEN ((NOT (current_setting('alphapulse_encryption.writer'::text, true) IS DISTINCT FROM 'engine'::text)) AND has_table_privilege(('public.encryption_ranges'::regclass)::oid, 'UPDATE'::text)) THEN record_image_ne(ROW(old.secret, old.other), ROW(new.secret, new.other))
            ELSE record_image_ne(ROW(old.secret, old.secret_encrypted, old.secret_search, old.other, old.other_encrypted), ROW(new.secret, new.secret_encrypted, new.secret_search, new.other, new.other_encrypted))
        END) EXECUTE FUNCTION public.encryption_guard_half('plaintext', '');
COMMENT ON TRIGGER zzz_encryption_guard_update ON public.half IS 'alphapulse_encryption 4001d7b732bd49e6b69c7b9730d8cc5aa2dcb178163cac1474c272b5083f4012';
CREATE TRIGGER zzz_encryption_guard_update BEFORE UPDATE ON public.switched FOR EACH ROW WHEN (
        CASE
            WHEN ((NOT (current_setting('alphapulse_encryption.writer'::text, true) IS DISTINCT FROM 'engine'::text)) AND has_table_privilege(('public.encryption_ranges'::regclass)::oid, 'UPDATE'::text)) THEN record_image_ne(ROW(old.secret, old.other), ROW(new.secret, new.other))
            ELSE record_image_ne(ROW(old.secret, old.secret_encrypted, old.secret_search, old.other, old.other_encrypted), ROW(new.secret, new.secret_encrypted, new.secret_search, new.other, new.other_encrypted))
        END) EXECUTE FUNCTION public.encryption_guard_switched('ciphertext', '');
COMMENT ON TRIGGER zzz_encryption_guard_update ON public.switched IS 'alphapulse_encryption a1453d87ad82f5d2fd64d2e1d59c9714f7408acd50a20042d526b15236c7c916';
ALTER TABLE ONLY public.encryption_approvals
    ADD CONSTRAINT encryption_approvals_backup_id_fkey FOREIGN KEY (backup_id) REFERENCES public.encryption_backups(id);
REVOKE ALL ON FUNCTION public.encryption_approval_is_final() FROM PUBLIC;
REVOKE ALL ON FUNCTION public.encryption_audit_is_append_only() FROM PUBLIC;
REVOKE ALL ON FUNCTION public.encryption_guard_begun() FROM PUBLIC;
REVOKE ALL ON FUNCTION public.encryption_guard_half() FROM PUBLIC;
REVOKE ALL ON FUNCTION public.encryption_guard_switched() FROM PUBLIC;
REVOKE ALL ON FUNCTION public.encryption_report_key_usage(context text, key_version integer, messages bigint) FROM PUBLIC;
REVOKE ALL ON FUNCTION public.encryption_setting_is_allowed() FROM PUBLIC;

-- What one role writes and others read has bounds, whatever program writes it.

-- Of an approval from before, the end is brought within them, and what is missing is said to be.
UPDATE alphapulse_encryption.approvals
   SET expires_at = least(greatest(expires_at, approved_at), approved_at + interval '7 days'),
       verified_at = CASE WHEN isfinite(verified_at) THEN least(verified_at, approved_at) ELSE approved_at END,
       approver = left(coalesce(nullif(btrim(regexp_replace(approver, '[[:cntrl:]]', ' ', 'g')), ''), 'not given'),
                       200),
       reason = left(coalesce(nullif(btrim(regexp_replace(reason, '[[:cntrl:]]', ' ', 'g')), ''), 'not given'), 2000),
       revoked_at = CASE WHEN consumed_at IS NULL THEN coalesce(revoked_at, clock_timestamp()) END,
       revoked_by = CASE WHEN consumed_at IS NULL THEN coalesce(revoked_by, 'alphapulse_encryption') END
 WHERE expires_at < approved_at OR expires_at > approved_at + interval '7 days' OR verified_at > approved_at
    OR NOT isfinite(verified_at) OR approver !~ '[^[:space:]]' OR approver ~ '[[:cntrl:]]' OR length(approver) > 200
    OR reason !~ '[^[:space:]]' OR reason ~ '[[:cntrl:]]' OR length(reason) > 2000;
ALTER TABLE alphapulse_encryption.approvals
    ADD CONSTRAINT approval_ends CHECK (expires_at BETWEEN approved_at AND approved_at + interval '7 days'),
    ADD CONSTRAINT approval_follows CHECK (isfinite(verified_at) AND verified_at <= approved_at),
    ADD CONSTRAINT approver_is_named
        CHECK (approver ~ '[^[:space:]]' AND approver !~ '[[:cntrl:]]' AND length(approver) <= 200),
    ADD CONSTRAINT reason_is_given
        CHECK (reason ~ '[^[:space:]]' AND reason !~ '[[:cntrl:]]' AND length(reason) <= 2000);

-- Of the keys that the migration knows; a report of others would be somebody's own text in the reports of operators.
CREATE OR REPLACE FUNCTION public.encryption_report_key_usage(of_context text, of_version int, of_messages bigint)
    RETURNS bigint LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF $1 IS NULL OR $2 IS NULL OR $3 IS NULL OR $3 < 0 OR $3 > 4294967296 THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE =
            'encryption_report_key_usage takes a context, a key version and a number of messages, at most 2^32 at once';
    END IF;
    IF $1 NOT IN (SELECT u.context FROM alphapulse_encryption.key_usage u WHERE u.source = 'engine')
       OR $2 NOT IN (SELECT k.key_version FROM alphapulse_encryption.key_checks k) THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE =
            'encryption_report_key_usage takes contexts of the catalogue and key versions of this database';
    END IF;
    INSERT INTO alphapulse_encryption.key_usage AS u VALUES ($1, $2, 'application', $3)
        ON CONFLICT ON CONSTRAINT key_usage_pkey
        DO UPDATE SET messages = least(u.messages + excluded.messages, 4611686018427387904),
                      updated_at = clock_timestamp();
    RETURN (SELECT sum(u.messages) FROM alphapulse_encryption.key_usage u
             WHERE u.context = $1 AND u.key_version = $2);
END $$;
DELETE FROM alphapulse_encryption.key_usage
 WHERE source = 'application'
   AND context NOT IN (SELECT e.context FROM alphapulse_encryption.key_usage e WHERE e.source = 'engine');

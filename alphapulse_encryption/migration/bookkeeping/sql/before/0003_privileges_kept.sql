-- After 0003 where the database was begun in the layout before: whoever could read a table that is a view now, or call
-- the function for applications, still can.
DO $keep$
DECLARE
    kept record;
BEGIN
    FOR kept IN
        SELECT v.name, CASE x.grantee WHEN 0 THEN 'PUBLIC' ELSE x.grantee::regrole::text END AS grantee
          FROM (VALUES ('encryption_migrations', 'alphapulse_encryption.columns'::regclass),
                       ('encryption_tables', 'alphapulse_encryption.tables'::regclass)) AS v (name, oid)
          JOIN pg_catalog.pg_class c ON c.oid = v.oid CROSS JOIN aclexplode(c.relacl) x
         WHERE x.privilege_type = 'SELECT' AND x.grantee <> c.relowner
    LOOP
        EXECUTE format('GRANT SELECT ON public.%I TO %s', kept.name, kept.grantee);
    END LOOP;
    FOR kept IN
        SELECT CASE x.grantee WHEN 0 THEN 'PUBLIC' ELSE x.grantee::regrole::text END AS grantee
          FROM pg_catalog.pg_proc p CROSS JOIN aclexplode(p.proacl) x
         WHERE p.oid = 'public.encryption_report_key_usage_before(text, int, bigint)'::regprocedure
           AND x.grantee <> p.proowner
    LOOP
        EXECUTE format('GRANT EXECUTE ON FUNCTION public.encryption_report_key_usage(text, int, bigint) TO %s',
                       kept.grantee);
    END LOOP;
END $keep$;
DROP FUNCTION public.encryption_report_key_usage_before(text, int, bigint);

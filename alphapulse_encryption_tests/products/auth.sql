-- A hosted service for logging in: its schema belongs to a role of its own, the product's is another one with
-- row-level security, and what joins the two are triggers and functions that run with their owner's rights.
CREATE EXTENSION citext WITH SCHEMA public;
CREATE SCHEMA auth AUTHORIZATION products_auth_admin;
REVOKE ALL ON SCHEMA public FROM PUBLIC;
GRANT USAGE ON SCHEMA public TO products_anon, products_authenticated, products_service;
GRANT USAGE ON SCHEMA auth TO products_authenticated, products_service;
GRANT USAGE, CREATE ON SCHEMA public TO products_steward;

SET SESSION AUTHORIZATION products_auth_admin;
SET search_path = auth;

CREATE TYPE auth.factor_type AS ENUM ('totp', 'webauthn', 'phone');
CREATE TYPE auth.factor_status AS ENUM ('unverified', 'verified');
CREATE TYPE auth.aal_level AS ENUM ('aal1', 'aal2', 'aal3');

CREATE FUNCTION auth.claims() RETURNS jsonb LANGUAGE sql STABLE
    AS $$ SELECT coalesce(nullif(current_setting('request.jwt.claims', true), ''), '{}')::jsonb $$;
CREATE FUNCTION auth.uid() RETURNS uuid LANGUAGE sql STABLE AS $$ SELECT (auth.claims() ->> 'sub')::uuid $$;
CREATE FUNCTION auth.role() RETURNS text LANGUAGE sql STABLE AS $$ SELECT auth.claims() ->> 'role' $$;
CREATE FUNCTION auth.email() RETURNS text LANGUAGE sql STABLE AS $$ SELECT auth.claims() ->> 'email' $$;

CREATE TABLE auth.users (
    instance_id uuid,
    id uuid PRIMARY KEY,
    aud varchar(255),
    role varchar(255),
    email varchar(255),
    encrypted_password varchar(255),
    email_confirmed_at timestamptz,
    confirmation_token varchar(255),
    email_change varchar(255) DEFAULT '',
    email_change_confirm_status smallint DEFAULT 0
        CONSTRAINT users_email_change_confirm_status_check CHECK (email_change_confirm_status BETWEEN 0 AND 2),
    last_sign_in_at timestamptz,
    raw_app_meta_data jsonb,
    raw_user_meta_data jsonb,
    phone text DEFAULT NULL::varchar,
    phone_confirmed_at timestamptz,
    confirmed_at timestamptz GENERATED ALWAYS AS (LEAST(email_confirmed_at, phone_confirmed_at)) STORED,
    is_sso_user boolean NOT NULL DEFAULT false,
    is_anonymous boolean NOT NULL DEFAULT false,
    created_at timestamptz NOT NULL DEFAULT '2023-01-01 00:00:00+00',
    updated_at timestamptz,
    deleted_at timestamptz,
    CONSTRAINT users_can_be_reached CHECK (is_anonymous OR email IS NOT NULL OR phone IS NOT NULL));
COMMENT ON TABLE auth.users IS 'Auth: who can log in.';
COMMENT ON COLUMN auth.users.is_sso_user IS 'Set where the account comes from an identity provider: then e-mails repeat.';
CREATE UNIQUE INDEX users_email_partial_key ON auth.users (email) WHERE is_sso_user = false;
COMMENT ON INDEX auth.users_email_partial_key IS 'Auth: one account for each address, but for those of providers.';
CREATE UNIQUE INDEX users_phone_partial_key ON auth.users (phone) WHERE is_sso_user = false;
CREATE UNIQUE INDEX confirmation_token_idx ON auth.users (confirmation_token)
    WHERE confirmation_token !~ '^[0-9 ]*$';
CREATE INDEX users_instance_id_email_idx ON auth.users (instance_id, lower(email));
CREATE INDEX users_is_anonymous_idx ON auth.users (is_anonymous);

CREATE TABLE auth.identities (
    provider_id text NOT NULL,
    user_id uuid NOT NULL REFERENCES auth.users ON DELETE CASCADE,
    identity_data jsonb NOT NULL,
    provider text NOT NULL,
    last_sign_in_at timestamptz,
    email text GENERATED ALWAYS AS (lower(identity_data ->> 'email')) STORED,
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    CONSTRAINT identities_provider_id_provider_unique UNIQUE (provider_id, provider));
COMMENT ON COLUMN auth.identities.email IS 'Auth: follows from identity_data, and is there for the index.';
CREATE INDEX identities_email_idx ON auth.identities (email text_pattern_ops);
CREATE INDEX identities_user_id_idx ON auth.identities (user_id);

CREATE TABLE auth.sessions (
    id uuid PRIMARY KEY,
    user_id uuid NOT NULL REFERENCES auth.users ON DELETE CASCADE,
    aal auth.aal_level,
    not_after timestamptz,
    ip inet,
    user_agent text,
    tag text);
CREATE INDEX sessions_not_after_idx ON auth.sessions (not_after DESC);

CREATE TABLE auth.refresh_tokens (
    id bigserial PRIMARY KEY,
    token varchar(255) CONSTRAINT refresh_tokens_token_unique UNIQUE,
    parent varchar(255),
    session_id uuid REFERENCES auth.sessions ON DELETE CASCADE,
    revoked boolean);
CREATE INDEX refresh_tokens_parent_idx ON auth.refresh_tokens (parent);
CREATE INDEX refresh_tokens_session_id_revoked_idx ON auth.refresh_tokens (session_id, revoked);

CREATE TABLE auth.mfa_factors (
    id uuid PRIMARY KEY,
    user_id uuid NOT NULL REFERENCES auth.users ON DELETE CASCADE,
    friendly_name text,
    factor_type auth.factor_type NOT NULL,
    status auth.factor_status NOT NULL,
    secret text,
    phone text,
    last_challenged_at timestamptz UNIQUE,
    CONSTRAINT unique_phone_factor_per_user UNIQUE (user_id, phone));
CREATE UNIQUE INDEX mfa_factors_user_friendly_name_unique ON auth.mfa_factors (friendly_name, user_id)
    WHERE trim(BOTH FROM friendly_name) <> '';

CREATE TABLE auth.audit_log_entries (
    id uuid PRIMARY KEY,
    payload json,
    created_at timestamptz,
    ip_address varchar(64) NOT NULL DEFAULT '');

CREATE TABLE auth.one_time_tokens (
    id uuid PRIMARY KEY,
    user_id uuid NOT NULL REFERENCES auth.users ON DELETE CASCADE,
    token_type text NOT NULL,
    token_hash text NOT NULL CONSTRAINT one_time_tokens_token_hash_check CHECK (char_length(token_hash) > 0),
    relates_to text NOT NULL);
CREATE INDEX one_time_tokens_token_hash_hash_idx ON auth.one_time_tokens USING hash (token_hash);
CREATE INDEX one_time_tokens_relates_to_hash_idx ON auth.one_time_tokens USING hash (relates_to);
CREATE UNIQUE INDEX one_time_tokens_user_id_token_type_key ON auth.one_time_tokens (user_id, token_type);

ALTER TABLE auth.users ENABLE ROW LEVEL SECURITY;
ALTER TABLE auth.identities ENABLE ROW LEVEL SECURITY;
ALTER TABLE auth.sessions ENABLE ROW LEVEL SECURITY;
ALTER TABLE auth.refresh_tokens ENABLE ROW LEVEL SECURITY;
ALTER TABLE auth.mfa_factors ENABLE ROW LEVEL SECURITY;
ALTER TABLE auth.audit_log_entries ENABLE ROW LEVEL SECURITY;
ALTER TABLE auth.one_time_tokens ENABLE ROW LEVEL SECURITY;
GRANT SELECT, REFERENCES ON auth.users TO products_steward;
GRANT SELECT, UPDATE ON auth.users TO products_service;
GRANT TRIGGER ON auth.users TO products_steward;
RESET search_path;
RESET SESSION AUTHORIZATION;

SET SESSION AUTHORIZATION products_steward;
SET search_path = public;
CREATE TABLE public.profiles (
    id uuid PRIMARY KEY REFERENCES auth.users ON DELETE CASCADE,
    username citext UNIQUE,
    full_name text,
    contact_email citext,
    website text CONSTRAINT website_is_one CHECK (website ~ '^https?://'),
    updated_at timestamptz,
    CONSTRAINT username_length CHECK (char_length(username) >= 3));
CREATE TABLE public.organisations (
    id uuid PRIMARY KEY,
    name text NOT NULL);
CREATE TABLE public.memberships (
    organisation_id uuid REFERENCES public.organisations ON DELETE CASCADE,
    position smallint,
    user_id uuid REFERENCES public.profiles,
    invited_email text NOT NULL,
    role text NOT NULL DEFAULT 'member' CHECK (role IN ('owner', 'member')),
    PRIMARY KEY (organisation_id, position),
    CONSTRAINT memberships_invited_once UNIQUE (organisation_id, invited_email));
GRANT SELECT ON public.profiles TO products_anon;
GRANT SELECT, INSERT, UPDATE ON public.profiles TO products_authenticated;
GRANT ALL ON public.profiles, public.organisations, public.memberships TO products_service;
GRANT SELECT ON public.organisations TO products_authenticated;
GRANT SELECT, INSERT, UPDATE, DELETE ON public.memberships TO products_authenticated;

ALTER TABLE public.profiles ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.memberships ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.memberships FORCE ROW LEVEL SECURITY;
CREATE POLICY "Profiles are for everybody to see" ON public.profiles FOR SELECT TO products_anon, products_authenticated
    USING (true);
CREATE POLICY "Own profile is made" ON public.profiles FOR INSERT TO products_authenticated
    WITH CHECK (auth.uid() = id);
CREATE POLICY "Own profile is changed" ON public.profiles FOR UPDATE TO products_authenticated
    USING (auth.uid() = id) WITH CHECK (auth.uid() = id);
CREATE POLICY "Members see members" ON public.memberships FOR SELECT TO products_authenticated USING (true);
CREATE POLICY "Members invite" ON public.memberships FOR ALL TO products_authenticated
    USING (user_id = auth.uid()) WITH CHECK (role = 'member');
CREATE POLICY "Invitations are for their addressee" ON public.memberships AS RESTRICTIVE FOR UPDATE
    TO products_authenticated USING (user_id = auth.uid() OR invited_email = auth.email());

CREATE FUNCTION public.touch() RETURNS trigger LANGUAGE plpgsql
    AS $$ BEGIN NEW.updated_at := now(); RETURN NEW; END $$;
CREATE TRIGGER profiles_touch BEFORE UPDATE ON public.profiles FOR EACH ROW EXECUTE FUNCTION public.touch();

-- Each account gets a profile, with the name that it came with.
CREATE FUNCTION public.handle_new_user() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = ''
    AS $$ BEGIN
        INSERT INTO public.profiles (id, full_name) VALUES (NEW.id, NEW.raw_user_meta_data ->> 'full_name');
        RETURN NEW;
    END $$;
CREATE TRIGGER on_auth_user_created AFTER INSERT ON auth.users
    FOR EACH ROW EXECUTE FUNCTION public.handle_new_user();
CREATE FUNCTION public.follow_email() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = ''
    AS $$ BEGIN
        UPDATE public.profiles SET contact_email = NEW.email WHERE id = NEW.id;
        RETURN NEW;
    END $$;
CREATE TRIGGER on_auth_user_email_changed AFTER UPDATE OF email ON auth.users
    FOR EACH ROW WHEN (OLD.email IS DISTINCT FROM NEW.email) EXECUTE FUNCTION public.follow_email();
-- Only this one's text says what it reads.
CREATE FUNCTION public.account_of(address text) RETURNS uuid LANGUAGE sql STABLE SECURITY DEFINER SET search_path = ''
    AS $$ SELECT u.id FROM auth.users u WHERE u.email = address AND NOT u.is_sso_user $$;
CREATE VIEW public.people WITH (security_invoker) AS
    SELECT p.id, p.username, p.website, m.organisation_id FROM public.profiles p LEFT JOIN public.memberships m
        ON m.user_id = p.id;
GRANT SELECT ON public.people TO products_authenticated;
RESET search_path;
RESET SESSION AUTHORIZATION;

INSERT INTO auth.users (instance_id, id, aud, role, email, encrypted_password, email_confirmed_at, confirmation_token,
                        raw_app_meta_data, raw_user_meta_data, phone, phone_confirmed_at, is_sso_user, is_anonymous)
    SELECT '00000000-0000-0000-0000-000000000000', md5('user ' || n)::uuid, 'authenticated', 'authenticated',
           CASE WHEN n % 10 > 0 THEN CASE WHEN n % 8 = 0 THEN 'sso@corp.example' ELSE 'Person.' || n || '@mail.example' END END,
           '$2a$10$' || md5('password ' || n), CASE WHEN n % 3 > 0 THEN timestamptz '2023-02-01 10:00+00' + n * interval '1 hour' END,
           CASE WHEN n % 2 = 0 THEN '' ELSE md5('confirm ' || n) END,
           jsonb_build_object('provider', 'email', 'providers', jsonb_build_array('email')),
           CASE WHEN n % 7 > 0 THEN jsonb_build_object('full_name', 'Zoë "' || n || '" \ O''Neill', 'n', n) END,
           CASE WHEN n % 4 = 0 OR n % 10 = 0 THEN CASE WHEN n % 8 = 0 THEN '4915550000' ELSE '49155' || 10000 + n END END,
           CASE WHEN n % 4 = 0 THEN timestamptz '2023-03-01 10:00+00' END, n % 8 = 0, n % 10 = 5
      FROM generate_series(1, 40) n;
UPDATE public.profiles p SET username = 'name' || n, contact_email = 'Contact' || n || '@mail.example'
  FROM generate_series(1, 40) n WHERE p.id = md5('user ' || n)::uuid AND n % 9 > 0;
UPDATE public.profiles SET updated_at = '2023-04-01 00:00+00';
INSERT INTO auth.identities (provider_id, user_id, identity_data, provider, id)
    SELECT md5('user ' || n), md5('user ' || n)::uuid,
           jsonb_build_object('sub', n, 'email', 'Person.' || n || '@Mail.Example', 'email_verified', n % 2 = 0),
           CASE WHEN n % 8 = 0 THEN 'saml' ELSE 'email' END, md5('identity ' || n)::uuid
      FROM generate_series(1, 40) n;
INSERT INTO auth.sessions (id, user_id, aal, ip, user_agent)
    SELECT md5('session ' || n)::uuid, md5('user ' || (1 + n % 40))::uuid, 'aal1', ('198.51.100.' || n)::inet,
           CASE WHEN n % 5 > 0 THEN 'Mozilla/5.0 (X11) n/' || n END
      FROM generate_series(1, 50) n;
INSERT INTO auth.refresh_tokens (token, parent, session_id, revoked)
    SELECT md5('token ' || n), CASE WHEN n > 50 THEN md5('token ' || n - 50) END, md5('session ' || (1 + n % 50))::uuid, n <= 50
      FROM generate_series(1, 80) n;
INSERT INTO auth.mfa_factors (id, user_id, friendly_name, factor_type, status, secret, phone)
    SELECT md5('factor ' || n)::uuid, md5('user ' || (1 + n % 20))::uuid, CASE WHEN n % 3 > 0 THEN 'phone ' || n ELSE '' END,
           (enum_range(NULL::auth.factor_type))[1 + n % 3], 'verified', upper(md5('secret ' || n)),
           CASE WHEN n % 2 = 0 THEN '49155' || 20000 + n % 6 END
      FROM generate_series(1, 30) n;
INSERT INTO auth.audit_log_entries (id, payload, created_at, ip_address)
    SELECT md5('entry ' || n)::uuid, ('{"action":  "login", "actor": "person' || n || '", "a": [1,  2]}')::json,
           '2023-05-01 00:00+00', CASE WHEN n % 3 > 0 THEN '203.0.113.' || n ELSE '' END
      FROM generate_series(1, 60) n;
INSERT INTO auth.one_time_tokens (id, user_id, token_type, token_hash, relates_to)
    SELECT md5('once ' || n)::uuid, md5('user ' || n)::uuid, 'recovery', md5('hash ' || n), 'person' || n || '@mail.example'
      FROM generate_series(1, 20) n;
INSERT INTO public.organisations SELECT md5('org ' || n)::uuid, 'Organisation ' || n FROM generate_series(1, 5) n;
INSERT INTO public.memberships (organisation_id, position, user_id, invited_email, role)
    SELECT md5('org ' || o)::uuid, n, CASE WHEN n < 6 THEN md5('user ' || n)::uuid END, 'invited' || n || '@mail.example',
           CASE WHEN n = 1 THEN 'owner' ELSE 'member' END
      FROM generate_series(1, 5) o, generate_series(1, 8) n;
ANALYZE;

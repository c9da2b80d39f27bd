"""A hosted service for logging in: policies, partial unique indexes, triggers and schemas of several owners."""

from __future__ import annotations

import uuid
from hashlib import md5

from alphapulse_encryption_tests.products.product import Change, Product, Write

_ADMIN = "products_auth_admin"
_NEW = "00000000-0000-4000-8000-00000000000{n}"


def _id(text: str) -> str:
    return str(uuid.UUID(md5(text.encode()).hexdigest()))


def _by_user(change: Change, table: str, key: dict[str, str], values: dict[str, str | None], n: int) -> Write:
    claims = {"sub": _id(f"user {n}"), "role": "authenticated", "email": f"invited{n}@mail.example"}
    return Write(
        "products_authenticator",
        change,
        table,
        key,
        values,
        role="products_authenticated",
        claims=claims,
    )


PRODUCT = Product(
    name="auth",
    login="products_steward",
    told=(
        *("users_can_be_reached", "on_auth_user_email_changed", "on_auth_user_created", "identities.email"),
        *("Invitations are for their addressee", "account_of", "unique_phone_factor_per_user"),
        *("refresh_tokens_token_unique", "one_time_tokens_token_hash_check", "users_instance_id_email_idx"),
    ),
    prepared="""
        ALTER TABLE auth.identities ALTER COLUMN email DROP EXPRESSION;
        DROP TRIGGER on_auth_user_email_changed ON auth.users;
        CREATE OR REPLACE FUNCTION public.handle_new_user() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
            SET search_path = '' AS $$ BEGIN INSERT INTO public.profiles (id) VALUES (NEW.id); RETURN NEW; END $$;
    """,
    set_aside="""
        ALTER POLICY "Invitations are for their addressee" ON public.memberships USING (user_id = auth.uid());
    """,
    beside="""
        ALTER TABLE auth.users DROP CONSTRAINT users_can_be_reached, ADD CONSTRAINT users_can_be_reached
            CHECK (is_anonymous OR num_nonnulls(email, email_encrypted, phone, phone_encrypted) > 0);
    """,
    put_back="""
        ALTER POLICY "Invitations are for their addressee" ON public.memberships
            USING (user_id = auth.uid() OR invited_email = auth.email());
        ALTER TABLE auth.users DROP CONSTRAINT users_can_be_reached, ADD CONSTRAINT users_can_be_reached
            CHECK (is_anonymous OR email IS NOT NULL OR phone IS NOT NULL);
    """,
    asked={
        "account_of": "SELECT public.account_of('Person.7@mail.example')",
        "touch": "UPDATE public.profiles SET website = website",
        "handle_new_user": "INSERT INTO auth.users (id, is_anonymous) VALUES (gen_random_uuid(), true)",
        "people": "SELECT * FROM public.people",
    },
    writes=(
        # A person signs up, and gets a profile by the trigger.
        Write(
            _ADMIN,
            "insert",
            "auth.users",
            {"id": _NEW},
            {
                "email": "New.{n}@mail.example",
                "phone": "4915577{n}",
                "encrypted_password": "$2a$10$n{n}",
                "raw_user_meta_data": '{"full_name": "Neü"}',
            },
        ),
        Write(
            _ADMIN,
            "insert",
            "auth.users",
            {"id": _NEW.replace("0000{n}", "1000{n}")},
            {"email": "New.{n}@mail.example"},
        ),
        # For accounts of an identity provider, addresses repeat.
        Write(
            _ADMIN,
            "insert",
            "auth.users",
            {"id": _NEW.replace("0000{n}", "2000{n}")},
            {"email": "New.{n}@mail.example", "is_sso_user": "t"},
        ),
        Write(_ADMIN, "update", "auth.users", {"id": _id("user 7")}, {"email": "Moved.{n}@mail.example"}),
        Write(_ADMIN, "update", "auth.users", {"id": _id("user 8")}, {"is_sso_user": "f", "phone": "{n}"}),
        Write(
            _ADMIN,
            "update",
            "auth.users",
            {"id": _id("user 9")},
            {"is_sso_user": "t", "email": "Moved.{n}@mail.example"},
        ),
        Write(_ADMIN, "update", "auth.users", {"id": _id("user 9")}, {"is_sso_user": "f"}),
        Write(
            *("products_authenticator", "update", "auth.users", {"id": _id("user 11")}),
            {"raw_user_meta_data": '{"n": {n}, "ä": [1.50]}', "phone": None},
            role="products_service",
        ),
        Write(
            *(_ADMIN, "update", "auth.identities", {"id": _id("identity 3")}),
            {"identity_data": '{"sub": {n}}', "email": "sub{n}@mail.example"},
        ),
        Write(
            _ADMIN,
            "insert",
            "auth.sessions",
            {"id": _NEW},
            {"user_id": _NEW.replace("{n}", "1"), "ip": "192.0.2.{n}/32"},
        ),
        Write(
            _ADMIN,
            "insert",
            "auth.refresh_tokens",
            {"revoked": "f"},
            {"token": "fresh {n}", "parent": "fresh"},
        ),
        Write(_ADMIN, "insert", "auth.refresh_tokens", {"revoked": "f"}, {"token": "fresh {n}"}),
        Write(
            _ADMIN,
            "update",
            "auth.mfa_factors",
            {"id": _id("factor 2")},
            {"secret": "S{n}", "phone": "49{n}"},
        ),
        Write(
            _ADMIN,
            "insert",
            "auth.audit_log_entries",
            {"id": _NEW},
            {"payload": '{"a":  {n}, "a": 1}', "ip_address": ""},
        ),
        Write(
            _ADMIN,
            "update",
            "auth.one_time_tokens",
            {"id": _id("once 3")},
            {"token_hash": "h{n}", "relates_to": "r{n}"},
        ),
        Write(
            _ADMIN, "update", "auth.one_time_tokens", {"id": _id("once 3")}, {"token_hash": ""}, checked=True
        ),
        # Their own profile, and somebody else's.
        _by_user(
            "update",
            "profiles",
            {"id": _id("user 3")},
            {"full_name": "Me {n}", "contact_email": "Me{n}@x.example"},
            3,
        ),
        _by_user("update", "profiles", {"id": _id("user 4")}, {"full_name": "Me {n}"}, 3),
        _by_user(
            "insert",
            "memberships",
            {"organisation_id": _id("org 1"), "position": "1{n}"},
            {"invited_email": "friend{n}@mail.example", "user_id": _id("user 3")},
            3,
        ),
        _by_user(
            "insert",
            "memberships",
            {"organisation_id": _id("org 1"), "position": "2{n}"},
            {"invited_email": "friend{n}@mail.example", "user_id": _id("user 3")},
            3,
        ),
        _by_user(
            "insert",
            "memberships",
            {"organisation_id": _id("org 1"), "position": "3{n}"},
            {"invited_email": "rogue{n}@mail.example", "role": "owner"},
            3,
        ),
        _by_user(
            "update",
            "memberships",
            {"organisation_id": _id("org 2"), "position": "2"},
            {"invited_email": "again{n}@mail.example"},
            2,
        ),
        _by_user(
            "update",
            "memberships",
            {"organisation_id": _id("org 2"), "position": "3"},
            {"invited_email": "rogue{n}@mail.example"},
            2,
        ),
        _by_user("delete", "memberships", {"organisation_id": _id("org 3"), "position": "{n}"}, {}, 4),
    ),
)

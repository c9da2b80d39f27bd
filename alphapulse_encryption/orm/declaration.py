"""`encrypted(...)`: one declaration for the columns that an encrypted attribute has on its whole journey.

Declared once, it becomes the columns of the table's phase when its class is made:

| phase       | the attribute `email`      | beside it, written together with it              |
|-------------|----------------------------|--------------------------------------------------|
| `off`       | column `email`             | nothing                                          |
| `plaintext` | column `email`             | `email_encrypted`, `email_search`                |
| `dual`      | column `email_encrypted`   | `email_search`, and column `email` as `email_plaintext` |
| `encrypted` | column `email_encrypted`   | `email_search`                                   |
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import CHAR, Column, DateTime, Numeric, String
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, column_property
from sqlalchemy.types import JSON, TypeEngine

from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.orm.attributes import INFO, DeclaredComparator, EncryptedComparator
from alphapulse_encryption.orm.columns import Attribute, EncryptedColumn
from alphapulse_encryption.orm.phases import Phase, phase_of, refuse_unknown_phases
from alphapulse_encryption.orm.types import (
    SEARCH_COLUMN_LENGTH,
    EncryptedDateTime,
    EncryptedFloat,
    EncryptedJSON,
    EncryptedNumeric,
    _Encrypted,
)
from alphapulse_encryption.orm.writes import keep_written_together

ENCRYPTED_SUFFIX = "_encrypted"
SEARCH_SUFFIX = "_search"
PLAINTEXT_SUFFIX = "_plaintext"


def encrypted(
    kind: TypeEngine[Any],
    plaintext: TypeEngine[Any] | type[TypeEngine[Any]],
    *,
    search: bool = False,
    nullable: bool | None = None,
    default: Any = None,
    name: str | None = None,
    deferred: bool = False,
) -> Mapped[Any]:
    """Declare an encrypted attribute of a mapped class, in place of `mapped_column`.

    Args:
        kind: with the context that the catalogue gives the column.
        plaintext: the type of its plaintext column.
        search: whether the catalogue gives it a search index: equality works on ciphertext then.
        nullable: where left out, that is for the annotation to say, as with `mapped_column`.
        default: a value or a function. There is no `server_default`: the server cannot encrypt one.
        name: of the plaintext column, where it is not the attribute's.
        deferred: load it on access only.

    Raises:
        ConfigurationError: the types do not go together, or, when the class is made, it is not one that this works
            with, or there is no such phase.
    """
    refuse_unknown_phases()
    plain = plaintext() if isinstance(plaintext, type) else plaintext
    fitting = _fitting(kind, plain)
    unscaled = isinstance(fitting, EncryptedNumeric) and fitting.scale is None
    if search and (unscaled or isinstance(fitting, EncryptedFloat | EncryptedJSON)):
        raise ConfigurationError(
            f"{kind!r} cannot be declared with search=True: equal values of it have several text forms, and a token is "
            "that of one."
        )
    declaration = _Declaration(fitting, plain, search, nullable, default, name, deferred)
    return typing.cast(Mapped[Any], declaration)


def _fitting(kind: TypeEngine[Any], plain: TypeEngine[Any]) -> _Encrypted[Any]:
    """The encrypted type whose text is that of the plaintext column."""
    if not isinstance(kind, _Encrypted):
        raise ConfigurationError(
            "encrypted() takes one of the encrypted types first, and then that of the plaintext"
        )
    if isinstance(plain, CHAR):
        raise ConfigurationError(
            f"{kind!r} beside {plain!r}: PostgreSQL pads char(n) with blanks, and the two sides would differ. Use "
            "String where the column is varchar or text; make the column varchar first where it is not."
        )
    if isinstance(kind, EncryptedNumeric) and isinstance(plain, Numeric) and plain.precision is not None:
        scale = plain.scale or 0
        if kind.scale is None:
            return EncryptedNumeric(kind.context, scale=scale)
        if kind.scale != scale:
            raise ConfigurationError(f"{kind!r} has another scale than its plaintext column, {plain!r}")
    if (
        isinstance(kind, EncryptedDateTime)
        and isinstance(plain, DateTime)
        and kind.timezone != plain.timezone
    ):
        raise ConfigurationError(
            f"{kind!r} beside {plain!r}: both need the same timezone, for their values are aware or naive"
        )
    if isinstance(kind, EncryptedJSON) and isinstance(plain, JSON):
        binary = isinstance(plain.dialect_impl(PGDialect()), JSONB)  # type: ignore[no-untyped-call]
        if binary != kind.binary:
            raise ConfigurationError(
                f"{kind!r} beside {plain!r}: a column of the type {'jsonb' if binary else 'json'} needs "
                f"EncryptedJSON({kind.context!r}{'' if binary else ', binary=False'})"
            )
    return kind


@dataclass
class _Declaration:
    """What stands in a class body until the class is made."""

    kind: _Encrypted[Any]
    plain: TypeEngine[Any]
    search: bool
    nullable: bool | None
    default: Any
    column: str | None
    deferred: bool

    def __set_name__(self, owner: type, name: str) -> None:
        # Called before the class is mapped; annotations are there already.
        if self.nullable is None:
            self.nullable = _annotated_nullable(owner, name)
        if _table_of(owner) is not None:
            self.declare(owner, name)
        else:
            _expand_in_subclasses(owner, self, name)

    def declare(self, owner: type, name: str) -> None:
        """Give a class that is about to be mapped the columns of its table's phase."""
        table = _table_of(owner)
        if table is None or "__table__" in vars(owner):
            raise ConfigurationError(
                f"encrypted() needs a declarative class with __tablename__: {owner.__name__} has none"
            )
        if issubclass(owner, MappedAsDataclass):
            raise ConfigurationError(
                f"encrypted() does not work with dataclass mappings: make {owner.__name__} a plain declarative class"
            )
        phase, column = phase_of(table), self.column or name
        attribute = Attribute(
            table=table,
            column=column,
            phase=phase,
            name=name,
            encrypted=name + ENCRYPTED_SUFFIX if phase is Phase.PLAINTEXT else name,
            plaintext={Phase.PLAINTEXT: name, Phase.DUAL: name + PLAINTEXT_SUFFIX}.get(phase),
            search=name + SEARCH_SUFFIX if self.search else None,
        )
        kind = EncryptedColumn(self.kind, attribute, self.plain)
        envelopes: tuple[str, TypeEngine[Any]] = column + ENCRYPTED_SUFFIX, kind
        plaintext = column, self.plain
        reads_plaintext = phase in {Phase.OFF, Phase.PLAINTEXT}
        main = Column(
            *(plaintext if reads_plaintext else envelopes),
            key=name,
            nullable=bool(self.nullable),
            default=self.default,
        )
        if phase is Phase.OFF:
            setattr(owner, name, column_property(main, deferred=self.deferred))
            return
        comparator = DeclaredComparator if reads_plaintext else EncryptedComparator
        declared = column_property(
            main, comparator_factory=comparator, deferred=self.deferred, info={INFO: kind}
        )
        setattr(owner, name, declared)
        others = {
            attribute.search: (column + SEARCH_SUFFIX, String(SEARCH_COLUMN_LENGTH)),
            attribute.encrypted: envelopes,
            attribute.plaintext: plaintext,
        }
        for key in reversed(attribute.keys[1:]):
            if hasattr(owner, key):
                raise ConfigurationError(
                    f"{owner.__name__}.{key} is declared beside encrypted(): it comes with {owner.__name__}.{name}, "
                    "remove it"
                )
            companion = Column(*others[key], key=key, nullable=True, default=_companion(kind, key))
            # What is selected for the attribute may need the plaintext; nothing else is read.
            unread = self.deferred or key != attribute.plaintext
            setattr(owner, key, column_property(companion, deferred=unread))
        keep_written_together(owner, name, kind)


def _companion(kind: EncryptedColumn, key: str) -> Callable[[Any], Any]:
    """What an INSERT writes to a column beside the one that is read."""
    return lambda context: kind.beside(key, _given(context, kind.attribute.name))


def _given(context: Any, key: str) -> Any:
    """What an INSERT gives a column; None where it is an SQL expression or left to the server: the value stays pending.

    SQLAlchemy's own view of one of several rows (`VALUES (…), (…)`) fails where the ORM made the statement.
    """
    parameters = context.get_current_parameters(isolate_multiinsert_groups=False)
    # The second row and all later ones have columns of their own, counted from 0.
    index = getattr(context.current_column, "index", None)
    if index is None:
        return parameters.get(f"{key}_m0", parameters.get(key))
    return parameters.get(f"{key}_m{index + 1}")


def _table_of(owner: type) -> str | None:
    """What phases call the table of a class: `name`, or `schema.name` outside `public`."""
    name = getattr(owner, "__tablename__", None)
    if not isinstance(name, str):
        return None
    arguments = getattr(owner, "__table_args__", None)
    options = arguments[-1] if isinstance(arguments, tuple) and arguments else arguments
    schema = options.get("schema") if isinstance(options, dict) else None
    if schema is None and issubclass(owner, DeclarativeBase):
        schema = owner.metadata.schema
    return name if schema in {None, "public"} else f"{schema}.{name}"


def _expand_in_subclasses(owner: type, declaration: _Declaration, name: str) -> None:
    """Declare the attribute in every mapped class that is made of a mixin or an abstract class."""
    declared: dict[str, _Declaration] = vars(owner).get("__encrypted_attributes__", {})
    declared[name] = declaration
    if len(declared) > 1:
        return
    owner.__encrypted_attributes__ = declared  # type: ignore[attr-defined]
    inherited = vars(owner).get("__init_subclass__")

    def initialize(cls: type, **arguments: Any) -> None:
        if _table_of(cls) is not None and not any("__mapper__" in vars(base) for base in cls.__mro__[1:-1]):
            if "__mapper__" in vars(cls):
                raise ConfigurationError(
                    f"{cls.__name__} was mapped before its mixin {owner.__name__} had its say: name the mixin before "
                    "the declarative base"
                )
            for attribute, waiting in declared.items():
                if attribute not in vars(cls):
                    waiting.declare(cls, attribute)
        if inherited is not None:
            inherited.__get__(None, cls)(**arguments)
        else:
            inherit: Any = super(owner, cls)
            inherit.__init_subclass__(**arguments)

    owner.__init_subclass__ = classmethod(initialize)  # type: ignore[assignment, arg-type]


def _annotated_nullable(owner: type, name: str) -> bool:
    """Whether the annotation of an attribute allows None; True where there is none, as with `mapped_column`."""
    annotation = inspect.get_annotations(owner).get(name)
    if annotation is None:
        return True
    arguments = (annotation,) if isinstance(annotation, str) else typing.get_args(annotation)
    return any(_allows_none(argument) for argument in arguments)


def _allows_none(annotation: Any) -> bool:
    if isinstance(annotation, str | typing.ForwardRef):
        return re.search(r"\b(Optional|None)\b", str(annotation)) is not None
    united = typing.get_origin(annotation) in {typing.Union, types.UnionType}
    return united and types.NoneType in typing.get_args(annotation)

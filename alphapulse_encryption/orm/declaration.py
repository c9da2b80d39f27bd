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

from collections.abc import Callable
from typing import Any, Self

from sqlalchemy import CHAR, Column, DateTime, Numeric, String
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.orm import (
    ColumnProperty,
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    MappedColumn,
    column_property,
)
from sqlalchemy.types import JSON, TypeEngine

from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.orm.attributes import INFO, DeclaredComparator, EncryptedComparator
from alphapulse_encryption.orm.columns import Attribute, EncryptedColumn
from alphapulse_encryption.orm.phases import Phase, phase_of
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
    plain = plaintext() if isinstance(plaintext, type) else plaintext
    fitting = _fitting(kind, plain)
    unscaled = isinstance(fitting, EncryptedNumeric) and fitting.scale is None
    if search and (unscaled or isinstance(fitting, EncryptedFloat | EncryptedJSON)):
        raise ConfigurationError(
            f"{kind!r} cannot be declared with search=True: equal values of it have several text forms, and a token is "
            "that of one."
        )
    return _Declared(fitting, plain, search, nullable, default, name, deferred)


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


class _Declared(MappedColumn[Any]):
    """Stands in a class body, or a mixin's, until a class is mapped; then it has the columns of its table's phase."""

    def __init__(
        self,
        kind: _Encrypted[Any],
        plain: TypeEngine[Any],
        searchable: bool,
        nullable: bool | None,
        default: Any,
        name: str | None,
        deferred: bool,
    ) -> None:
        options = {} if nullable is None else {"nullable": nullable}
        super().__init__(plain, name=name, **options)
        self._kind, self._plain, self._searchable = kind, plain, searchable
        self._default, self._deferred = default, deferred

    def _copy(self, **options: Any) -> Self:
        copy = super()._copy(**options)
        vars(copy).update(vars(self))
        return copy

    @property
    def mapper_property_to_assign(self) -> ColumnProperty[Any]:
        return self._property

    def declarative_scan(
        self,
        decl_scan: Any,
        registry: Any,
        cls: type,
        originating_module: str | None,
        key: str,
        *annotated: Any,
    ) -> None:
        """SQLAlchemy calls this as it maps a class; afterwards it asks for the property and its column."""
        table = _table_of(cls)
        if table is None or "__table__" in vars(cls):
            raise ConfigurationError(
                f"encrypted() needs a declarative class with __tablename__: {cls.__name__} has none"
            )
        if issubclass(cls, MappedAsDataclass):
            raise ConfigurationError(
                f"encrypted() does not work with dataclass mappings: make {cls.__name__} a plain declarative class"
            )
        # Settles the plaintext column's name, and whether it may be None.
        super().declarative_scan(decl_scan, registry, cls, originating_module, key, *annotated)
        phase, name, column = phase_of(table), key, self.column.name
        attribute = Attribute(
            table=table,
            column=column,
            phase=phase,
            name=name,
            encrypted=name + ENCRYPTED_SUFFIX if phase is Phase.PLAINTEXT else name,
            plaintext={Phase.PLAINTEXT: name, Phase.DUAL: name + PLAINTEXT_SUFFIX}.get(phase),
            search=name + SEARCH_SUFFIX if self._searchable else None,
        )
        kind = EncryptedColumn(self._kind, attribute, self._plain)
        columns: dict[str | None, tuple[str, TypeEngine[Any]]] = {
            attribute.search: (column + SEARCH_SUFFIX, String(SEARCH_COLUMN_LENGTH)),
            attribute.encrypted: (column + ENCRYPTED_SUFFIX, kind),
            attribute.plaintext: (column, self._plain),
        }
        if phase is Phase.OFF:
            columns[name] = column, self._plain
        self.column = Column(*columns[name], key=name, nullable=self.column.nullable, default=self._default)
        if phase is Phase.OFF:
            self._property = column_property(self.column, deferred=self._deferred)
            return
        self._property = column_property(
            self.column,
            comparator_factory=EncryptedComparator if attribute.reads_ciphertext else DeclaredComparator,
            deferred=self._deferred,
            info={INFO: kind},
        )
        # First, for the others' defaults are made from what is written to it.
        decl_scan.properties[name] = self
        for other in reversed(attribute.keys[1:]):
            if hasattr(cls, other):
                raise ConfigurationError(
                    f"{cls.__name__}.{other} is declared beside encrypted(): it comes with {cls.__name__}.{name}, "
                    "remove it"
                )
            companion = Column(*columns[other], key=other, nullable=True, default=_companion(kind, other))
            # What is selected for the attribute may need the plaintext; nothing else is read.
            unread = self._deferred or other != attribute.plaintext
            decl_scan.properties[other] = column_property(companion, deferred=unread)
        keep_written_together(cls, name, kind)


def _companion(kind: EncryptedColumn, key: str) -> Callable[[Any], Any]:
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

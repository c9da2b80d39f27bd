"""Declared attributes in queries: `User.email == …`, `select(User.email)`, `update(User).values(email=…)`.

Refuses what cannot work on ciphertext: operators and ORDER BY when the query is built; GROUP BY, DISTINCT and functions
before it is sent, because SQLAlchemy offers no earlier place.
"""

from __future__ import annotations

from typing import Any, NoReturn, cast

from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import ColumnProperty
from sqlalchemy.sql import ClauseElement, ColumnElement, Select
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.elements import Label, Null, TypeCoerce
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.operators import OperatorType
from sqlalchemy.sql.selectable import SelectBase
from sqlalchemy.types import Text

from alphapulse_encryption.orm.columns import EncryptedColumn, SelectedValue

# Of `ColumnProperty.info`: the type of the attribute's column of envelopes.
INFO = "alphapulse_encryption"


class DeclaredComparator(ColumnProperty.Comparator[Any]):
    """What is read from plaintext and written to both sides: all operators work."""

    @property
    def encrypted_type(self) -> EncryptedColumn:
        return cast(EncryptedColumn, self.prop.info[INFO])

    def column_of(self, key: str) -> Any:
        """Of the class or alias that is asked."""
        if key == self.prop.key:
            return self.expressions[0]
        return getattr(self._parententity.entity, key)

    def _bulk_update_tuples(self, value: Any) -> Any:
        """What `insert(User).values(email=…)` and `update(User).values(email=…)` write: all columns at once."""
        kind, attribute = self.encrypted_type, self.encrypted_type.attribute
        if isinstance(value, Null):
            value = None
        if isinstance(value, ClauseElement) or hasattr(value, "__clause_element__"):
            if attribute.reads_ciphertext:
                refuse_expression(kind)
            # Written by itself: the value is pending, and a backfill encrypts it.
            return [(self.column_of(attribute.name), value)]
        return [(self.column_of(key), kind.beside(key, value)) for key in attribute.keys]


class EncryptedComparator(DeclaredComparator):
    """What is read from ciphertext."""

    def __clause_element__(self) -> Any:
        return Selected(self.encrypted_type.reading(self._reading_column), SelectedValue(self.encrypted_type))

    def _reading_column(self, key: str) -> Any:
        column = self.column_of(key)
        return TypeCoerce(column, Text()) if key == self.prop.key else column

    def operate(self, op: OperatorType, *other: Any, **kwargs: Any) -> ColumnElement[Any]:
        compared = self.encrypted_type.compare(op, other, self._reading_column)
        # An OR forgets that it is about an entity, and criteria given for the entity would not be applied.
        return compared._set_propagate_attrs(
            {"compile_state_plugin": "orm", "plugin_subject": self._parententity}
        )

    def reverse_operate(self, op: OperatorType, other: Any, **kwargs: Any) -> ColumnElement[Any]:
        self.encrypted_type.refuse(op)


def refuse_expression(kind: EncryptedColumn) -> NoReturn:
    raise InvalidRequestError(
        f"{kind.attribute} is encrypted in the phase {kind.attribute.phase} and takes values, not SQL expressions: "
        "load the rows, and assign the values."
    )


class Selected(TypeCoerce[Any]):
    """An attribute in the columns of a SELECT, the only place where it has a meaning."""

    inherit_cache = True

    @property
    def _order_by_label_element(self) -> Any:
        # SQLAlchemy asks for this when the element becomes part of an ORDER BY.
        self.refuse("ORDER BY")

    @property
    def _proxy_key(self) -> str:
        # What rows and subqueries call it.
        return cast(SelectedValue, self.type).column.attribute.name

    def refuse(self, place: str) -> NoReturn:
        attribute = cast(SelectedValue, self.type).column.attribute
        raise InvalidRequestError(
            f"{attribute} is encrypted in the phase {attribute.phase} and cannot be used in {place}: the "
            "database knows neither its order nor its value. Do it after loading."
        )


@compiles(Selected)
def _compile_selected(element: Selected, compiler: SQLCompiler, **kwargs: Any) -> str:
    statement = compiler.stack[-1].get("selectable") if compiler.stack else None
    if isinstance(statement, Select):
        _refuse_misuse(statement)
    return compiler.process(element.clause, **kwargs)


def _refuse_misuse(statement: Select[Any]) -> None:
    for place, clauses in (
        ("ORDER BY", statement._order_by_clauses),
        ("GROUP BY", statement._group_by_clauses),
        ("DISTINCT ON", statement._distinct_on),
    ):
        for clause in clauses:
            _refuse_inside(clause, place)
    for column in statement._raw_columns:
        selected = column.element if isinstance(column, Label) else column
        if isinstance(selected, Selected):
            if statement._distinct:
                selected.refuse("DISTINCT")
        else:
            _refuse_inside(selected, "an expression")
    for criterion in statement._where_criteria:
        _refuse_inside(criterion, "an expression")


def _refuse_inside(element: ClauseElement, place: str) -> None:
    """Refuse an attribute below an element; not what counts it, nor statements, which are looked at by themselves."""
    if isinstance(element, Selected):
        element.refuse(place)
    if isinstance(element, SelectBase) or (isinstance(element, FunctionElement) and element.name == "count"):
        return
    for child in element.get_children():
        _refuse_inside(child, place)

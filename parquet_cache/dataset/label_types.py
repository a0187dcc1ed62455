"""The Arrow types of label columns, from all of their values."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from core.base.errors import RunError


@dataclass
class LabelTypes:
    """Widens the type of each column as values come: null to anything, whole numbers to floats where both occur."""

    columns: tuple[str, ...]
    _schema: pa.Schema | None = field(default=None, init=False)

    def see(self, rows: Sequence[tuple[Any, ...]], where: str) -> None:
        """Takes the values of some rows into account; raises RunError naming a column without one type."""
        seen = []
        for place, name in enumerate(self.columns):
            try:
                seen.append(pa.field(name, pa.infer_type([row[place] for row in rows])))
            except pa.ArrowException as error:
                raise RunError(f"{where}: --ds_label_columns {name}: its values have no one type: {error}") from None
        self._widen(pa.schema(seen), where)

    def _widen(self, seen: pa.Schema, where: str) -> None:
        try:
            known = [] if self._schema is None else [self._schema]
            self._schema = pa.unify_schemas([*known, seen], promote_options="permissive")
        except pa.ArrowException as error:
            raise RunError(f"{where}: --ds_label_columns: a column has values of two types: {error}") from None

    @property
    def schema(self) -> pa.Schema:
        """The columns in their order."""
        return pa.schema([]) if self._schema is None else self._schema

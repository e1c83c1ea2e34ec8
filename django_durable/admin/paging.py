"""Pages over tables of any size."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from django.core.paginator import Paginator
from django.db.models import QuerySet

# At run time Paginator takes no type argument; the type checker wants one.
if TYPE_CHECKING:
    AnyPaginator = Paginator[Any]
else:
    AnyPaginator = Paginator

CAP = 10_000


class CappedPaginator(AnyPaginator):
    """Counts `CAP` rows and one more, never the whole table; pages end at the cap."""

    @cached_property
    def _counted(self) -> int:
        if not isinstance(self.object_list, QuerySet):
            return len(self.object_list)
        # The LIMIT stands inside: COUNT(*) FROM (SELECT ... LIMIT 10001).
        return self.object_list.order_by().values("pk")[: CAP + 1].count()

    @cached_property
    def count(self) -> int:
        return min(self._counted, CAP)

    @property
    def is_capped(self) -> bool:
        """Whether there are more rows than `count` says."""
        return self._counted > CAP

"""Work done ahead of whoever needs it, in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(
    pool: Executor, work: Callable[[Item], Result], items: Iterable[Item], count: int
) -> Iterator[Result]:
    """Yield `work(item)` in the items' order, while up to `count` more results are being made."""
    making: deque[Future[Result]] = deque()
    for item in items:
        making.append(pool.submit(work, item))
        if len(making) > count:
            yield making.popleft().result()
    while making:
        yield making.popleft().result()

"""One thread for matrix products: with several, the order of their sums depends on how many there are."""

from collections.abc import Iterator
from contextlib import contextmanager

from threadpoolctl import threadpool_limits


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limits numpy's BLAS in the whole process, meanwhile. It is not to be nested by several threads."""
    with threadpool_limits(limits=1, user_api="blas"):
        yield


def keep_one_blas_thread() -> None:
    """Limits it until the process ends."""
    threadpool_limits(limits=1, user_api="blas")

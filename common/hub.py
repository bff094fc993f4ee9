"""Calls to the Hugging Face Hub that fail: for what reason, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import UserError, one_line


@contextmanager
def hub_errors(
    repository: str, told: str, way_out: str = "", also: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Turn the error of a call to the Hub into a UserError: "{told}: the error's words{way_out}".

    `also` is what the call may raise besides. huggingface_hub is imported only after an error.
    """
    try:
        yield
    except (*_kinds(), *also) as error:
        check_gated(repository, error)
        raise UserError(f"{told}: {one_line(error)}{way_out}") from error


def _kinds() -> tuple[type[Exception], ...]:
    """What a call to the Hub may raise.

    An answer such as "not found" is an OSError, a wrong name a ValueError; a connection that
    couldn't be made or that broke off is only an HTTPError, of the client that the package uses.
    """
    from huggingface_hub.errors import HTTPError, XetDownloadError

    return OSError, ValueError, HTTPError, XetDownloadError


def check_gated(repository: str, error: Exception) -> None:
    """Raises UserError if a call to the Hub failed because there are terms to accept first.

    `datasets` has only words for it: it drops the error that it got.
    """
    from huggingface_hub.errors import GatedRepoError

    if isinstance(error, GatedRepoError) or "is a gated dataset on the Hub" in str(error):
        raise UserError(
            f"{repository} is gated: accept its terms on the Hub, then `hf auth login`"
        ) from error

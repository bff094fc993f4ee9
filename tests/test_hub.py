"""What the Hub doesn't give is told in one line, and its package waits until it is needed.

With a Hub that answers: tests/test_convert.py, tests/test_sources.py, tests/test_tasks.py.
"""

from __future__ import annotations

import pytest
from conftest import run
from huggingface_hub.errors import XetDownloadError

from common.errors import UserError
from common.hub import hub_errors


def test_an_error_of_the_hub_is_told_with_its_reason_and_the_way_out():
    with pytest.raises(UserError, match="^no a/b: so it is; wait$") as caught:
        with hub_errors("a/b", "no a/b", "; wait"):
            raise OSError("so\nit is")
    assert isinstance(caught.value.__cause__, OSError)


def test_terms_to_accept_first_are_told_instead():
    with pytest.raises(UserError, match="^a/b is gated: accept its terms on the Hub"):
        with hub_errors("a/b", "no a/b"):
            raise OSError("Dataset 'a/b' is a gated dataset on the Hub. Visit it to ask for access")


def test_another_error_is_left_as_it_is_unless_it_is_asked_for():
    with pytest.raises(KeyError), hub_errors("a/b", "no a/b"):
        raise KeyError("train")
    with pytest.raises(UserError, match="^no a/b: 'train'$"):
        with hub_errors("a/b", "no a/b", also=(KeyError,)):
            raise KeyError("train")


def test_the_package_is_imported_only_after_an_error():
    code = "import sys\nfrom common import hub\nwith hub.hub_errors('', ''): pass\n"
    assert run("-c", code + "sys.exit('huggingface_hub' in sys.modules)").status == 0


def test_a_download_by_xet_that_breaks_off_is_told():
    with pytest.raises(UserError, match="^no a/b: it broke off$"), hub_errors("a/b", "no a/b"):
        raise XetDownloadError("it broke off")

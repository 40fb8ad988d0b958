"""Wrong calls, a line each."""

from typing import Any

import pytest


def refused(*cases: tuple, kind: Any = ValueError) -> None:
    """Of each case (pattern, function, *arguments) the call raises an error of this kind whose message matches the pattern."""
    for pattern, function, *arguments in cases:
        with pytest.raises(kind, match=pattern):
            function(*arguments)

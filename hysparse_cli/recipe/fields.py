"""The types of recipe fields, and what every section has in common."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from hysparse_cli.files.paths import check_given, expanded

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
FilePath = Annotated[str, AfterValidator(expanded)]
ModelName = Annotated[str, AfterValidator(check_given)]  # a folder or hub id
Positive = Annotated[int, Field(gt=0, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
# YAML reads 1e-3 as a string, so numbers with a point are not held to strict types.
Real = Annotated[float, Field(strict=False, allow_inf_nan=False)]
Fraction = Annotated[Real, Field(ge=0, le=1)]
Beta = Annotated[Real, Field(ge=0, lt=1)]

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def bytes_of(size: str) -> int:
    """The bytes of a size such as ``5GB``, ``300 MiB`` or ``1000000``.

    Raises: ValueError where it is not a number and a unit.
    """
    found = re.fullmatch(r"([0-9]{1,18}) ?([A-Za-z]*)", size.strip())
    if not found or found[2].upper() not in _UNITS or not int(found[1]):
        raise ValueError("not a size such as 5GB, 500MB or 2GiB")
    return int(found[1]) * _UNITS[found[2].upper()]


def _checked_size(size: str) -> str:
    bytes_of(size)
    return size


Size = Annotated[str, AfterValidator(_checked_size)]


class Section(BaseModel):
    """A command's options: unknown fields and loose types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

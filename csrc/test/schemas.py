"""Writes the schemas of all iwsgd_ext operators as C++ definitions: python schemas.py OUTPUT."""

import sys
from pathlib import Path

import torch

import iwsgd_ext  # noqa: F401  (defines the operators)

names = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("iwsgd_ext::"))
schemas = [str(torch._C._get_schema(*(name.split(".") if "." in name else (name, "")))) for name in names]
if not schemas:
    sys.exit("importing iwsgd_ext defines no operators")
Path(sys.argv[1]).write_text("".join(f'm.def("{schema}");\n' for schema in schemas))

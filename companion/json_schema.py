"""jsonschema, without what takes three seconds of its import.

Where JupyterLab is installed, so is rfc3987-syntax, which builds a grammar of IRIs when it is imported, and
jsonschema imports it for the formats "iri" and "iri-reference". No schema of the course uses these two, and
by this module they are not checked.

https://github.com/python-jsonschema/jsonschema/blob/main/jsonschema/_format.py
"""

import sys

_GRAMMAR = "rfc3987_syntax"
_wanted = _GRAMMAR in sys.modules
if not _wanted:
    sys.modules[_GRAMMAR] = None  # then an import of it fails, which jsonschema is ready for
try:
    from jsonschema import Draft202012Validator, SchemaError
    from jsonschema.validators import validator_for
finally:
    if not _wanted:
        del sys.modules[_GRAMMAR]

__all__ = ["Draft202012Validator", "SchemaError", "validator_for"]

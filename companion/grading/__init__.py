"""From solutions to the notebooks that learners get, and from submissions to a gradebook."""

import companion.json_schema  # noqa: F401 - before nbformat, which would import jsonschema the slow way

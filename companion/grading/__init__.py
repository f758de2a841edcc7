"""From solutions to the notebooks that learners get, and from submissions to a gradebook."""

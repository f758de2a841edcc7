"""An instructor's side: learners' notebooks are made from their solutions here, and checked against them."""

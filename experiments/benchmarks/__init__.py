"""How close to the limits: each figure beside the limit measured in the same run."""

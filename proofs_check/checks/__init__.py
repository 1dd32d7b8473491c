"""One file for each family of checks. Importing a module registers its checks, in this order."""

from proofs_check.checks import lemmas_symbolic as lemmas_symbolic  # isort: skip
from proofs_check.checks import bounds_symbolic as bounds_symbolic  # isort: skip
from proofs_check.checks import every_order as every_order  # isort: skip
from proofs_check.checks import server_step as server_step  # isort: skip
from proofs_check.checks import defaults_and_examples as defaults_and_examples  # isort: skip
from proofs_check.checks import random_runs as random_runs  # isort: skip
from proofs_check.checks import server_events as server_events  # isort: skip
from proofs_check.checks import long_server_runs as long_server_runs  # isort: skip
from proofs_check.checks import momentum_rates as momentum_rates  # isort: skip
from proofs_check.checks import long_simulations as long_simulations  # isort: skip
from proofs_check.checks import worker_details as worker_details  # isort: skip
from proofs_check.checks import bounds_measured as bounds_measured  # isort: skip
from proofs_check.checks import special_cases as special_cases  # isort: skip
from proofs_check.checks import convergence_rates as convergence_rates  # isort: skip
from proofs_check.checks import field_rules_exact as field_rules_exact  # isort: skip
from proofs_check.checks import field_identities as field_identities  # isort: skip
from proofs_check.checks import kept_states as kept_states  # isort: skip
from proofs_check.checks import uneven_local_steps as uneven_local_steps  # isort: skip

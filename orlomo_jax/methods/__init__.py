"""Methods: everything that server and workers must agree on."""

from orlomo_jax.methods.field import FIELD_METHODS as FIELD_METHODS
from orlomo_jax.methods.fingerprint import with_fingerprint as with_fingerprint
from orlomo_jax.methods.method import Method as Method
from orlomo_jax.methods.paper import METHOD_NAMES as METHOD_NAMES
from orlomo_jax.methods.registry import make_method as make_method
from orlomo_jax.methods.registry import register_method as register_method

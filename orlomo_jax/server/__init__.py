"""The parameter server, which applies each report at most once."""

from orlomo_jax.server.audit import Audit as Audit
from orlomo_jax.server.audit import AuditError as AuditError
from orlomo_jax.server.parameter_server import ParameterServer as ParameterServer
from orlomo_jax.server.reports import RejectedReportError as RejectedReportError
from orlomo_jax.server.reports import Report as Report
from orlomo_jax.server.reports import Task as Task
from orlomo_jax.server.state import ServerState as ServerState
from orlomo_jax.server.step import apply_report as apply_report
from orlomo_jax.server.task_table import TaskId as TaskId
from orlomo_jax.server.task_table import TaskTable as TaskTable

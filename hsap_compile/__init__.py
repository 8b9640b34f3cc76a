"""hsap-compile: train unmodified models on packed sequences over many ranks.

``torch.compile(model, backend="hsap")`` needs no import of this package.
"""

from hsap_compile.backend import hsap as hsap
from hsap_compile.errors import Refused as Refused
from hsap_compile.explanation import explain as explain
from hsap_compile.options import Options as Options
from hsap_compile.plan.cost import CostModel as CostModel
from hsap_compile.plan.report import make_plan as make_plan
from hsap_compile.runtime import prefetch as prefetch
from hsap_compile.sharded import shard_parameters as shard_parameters

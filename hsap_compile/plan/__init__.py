"""The plan of one batch: masks to placement, transfers, slices and tables. Integers only, no torch."""

from hsap_compile.plan.attended import Attended as Attended
from hsap_compile.plan.check import BrokenPlan as BrokenPlan
from hsap_compile.plan.placement import Kind as Kind
from hsap_compile.plan.placement import MeshShape as MeshShape
from hsap_compile.plan.placement import Placement as Placement
from hsap_compile.plan.placement import place as place
from hsap_compile.plan.slices import BAND as BAND
from hsap_compile.plan.slices import CAUSAL as CAUSAL
from hsap_compile.plan.slices import FULL as FULL
from hsap_compile.plan.slices import MOD as MOD
from hsap_compile.plan.tables import Exchange as Exchange
from hsap_compile.plan.tables import MaskPlan as MaskPlan
from hsap_compile.plan.tables import MaskTables as MaskTables
from hsap_compile.plan.tables import Plan as Plan
from hsap_compile.plan.tables import RankTables as RankTables
from hsap_compile.plan.tables import ReceiveLimit as ReceiveLimit
from hsap_compile.plan.tables import make as make

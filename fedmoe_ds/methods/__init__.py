"""Methods: one published system, one readable file; and all that a method needs, in one place.

A method, ours or a third party's, imports from here alone; a test holds our own to that. What stands in `__all__` keeps its
name and meaning within a minor version, wherever in the package it moves.
"""

from fedmoe_ds.aggregation.averaged_statistics import Statistic, Summary
from fedmoe_ds.aggregation.lora_factors import FactorPair
from fedmoe_ds.aggregation.weighing import Weighing
from fedmoe_ds.clients.assignment import FIRST_STEP, Assignment, PseudoGradient, leading
from fedmoe_ds.clients.balanced_assignment import balanced, load_bounds
from fedmoe_ds.clients.client import Client, counts_of, tiers_of
from fedmoe_ds.clients.client_view import ClientView
from fedmoe_ds.clients.expert_budgets import add_best, best, cover, drop_worst, scattered
from fedmoe_ds.clients.facility_location import Facilities
from fedmoe_ds.clients.fingerprint import Projection
from fedmoe_ds.clients.update import ClientUpdate
from fedmoe_ds.config import Config
from fedmoe_ds.devices.channel import Band, computing_joules, distances, fading, path_gain, watts
from fedmoe_ds.errors import UserError
from fedmoe_ds.foundation.expansion import OUTPUTS
from fedmoe_ds.foundation.pre_gate import router_loss
from fedmoe_ds.methods.base import (
    Method,
    MethodParams,
)
from fedmoe_ds.methods.combined import Combined
from fedmoe_ds.methods.method_info import MethodInfo
from fedmoe_ds.methods.model_facts import ModelFacts
from fedmoe_ds.methods.own_experts import check_own_experts, without_routers
from fedmoe_ds.methods.presence import present
from fedmoe_ds.methods.product_norms import product_norms
from fedmoe_ds.methods.registry import load_method, method_for, method_names, with_defaults
from fedmoe_ds.methods.round_plan import Load, MeanContext, Memory, PlanContext, RoundContext, RoundPlan, Spending, TensorRule
from fedmoe_ds.model.adapter_bank import OWNED, ROUTER_BIAS, BlockSpec, remembered_block, shared_blocks
from fedmoe_ds.model.class_sums import CLASS_FEATURES, CLASS_TARGETS, class_means, class_shapes, class_sums
from fedmoe_ds.model.loss_per_expert import EXPERT_LOSS, EXPERT_TARGETS, loss_per_expert
from fedmoe_ds.model.moe_layer import RESCALER, ROUTER
from fedmoe_ds.model.objective import LocalStep, Objective, Predictions, Sums, Targets, TokenRouting
from fedmoe_ds.model.pass_context import RoutingObserver
from fedmoe_ds.model.router import Routing
from fedmoe_ds.model.router_losses import balance_loss
from fedmoe_ds.model.upload import upload
from fedmoe_ds.randomness import generator

__all__ = [
    "CLASS_FEATURES",
    "CLASS_TARGETS",
    "EXPERT_LOSS",
    "EXPERT_TARGETS",
    "FIRST_STEP",
    "OUTPUTS",
    "OWNED",
    "RESCALER",
    "ROUTER",
    "ROUTER_BIAS",
    "Assignment",
    "Band",
    "BlockSpec",
    "Client",
    "ClientUpdate",
    "ClientView",
    "Combined",
    "Config",
    "Facilities",
    "FactorPair",
    "Load",
    "LocalStep",
    "MeanContext",
    "Memory",
    "Method",
    "MethodInfo",
    "MethodParams",
    "ModelFacts",
    "Objective",
    "PlanContext",
    "Predictions",
    "Projection",
    "PseudoGradient",
    "RoundContext",
    "RoundPlan",
    "Routing",
    "RoutingObserver",
    "Spending",
    "Statistic",
    "Summary",
    "Sums",
    "Targets",
    "TensorRule",
    "TokenRouting",
    "UserError",
    "Weighing",
    "add_best",
    "balance_loss",
    "balanced",
    "best",
    "check_own_experts",
    "class_means",
    "class_shapes",
    "class_sums",
    "computing_joules",
    "counts_of",
    "cover",
    "distances",
    "drop_worst",
    "fading",
    "generator",
    "leading",
    "load_bounds",
    "load_method",
    "loss_per_expert",
    "method_for",
    "method_names",
    "path_gain",
    "present",
    "product_norms",
    "remembered_block",
    "router_loss",
    "scattered",
    "shared_blocks",
    "tiers_of",
    "upload",
    "watts",
    "with_defaults",
    "without_routers",
]

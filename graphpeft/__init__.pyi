# The public names, for type checkers and for `lazy_loader`, which imports each from here when it is first used.
from .applying import apply as apply
from .capturing.capture import capture as capture
from .errors import AdapterError as AdapterError
from .errors import CaptureError as CaptureError
from .errors import ExportError as ExportError
from .errors import FileError as FileError
from .errors import GraphPeftError as GraphPeftError
from .errors import MatchError as MatchError
from .errors import RuleError as RuleError
from .errors import VerifyError as VerifyError
from .inspect.bops import bops as bops
from .inspect.diff import diff as diff
from .inspect.explain import explain as explain
from .inspect.plan import plan as plan
from .inspect.report.write import report as report
from .inspect.sites import Sites as Sites
from .inspect.sites import sites as sites
from .inspect.to_networkx import to_networkx as to_networkx
from .inspect.trainable import trainable as trainable
from .inspect.watch import watch as watch
from .inspect.why import why as why
from .ir.program import Program as Program
from .ir.site import Site as Site
from .methods.base import Method as Method
from .passes.activate import activate as activate
from .passes.activate import disabled as disabled
from .passes.activate import reference as reference
from .passes.combine import combine as combine
from .passes.compact import compact as compact
from .passes.export import export as export
from .passes.load import load as load
from .passes.lower import lower as lower
from .passes.merge import merge as merge
from .passes.merge import merge_and_unload as merge_and_unload
from .passes.merge import unmerge as unmerge
from .passes.per_row import per_row as per_row
from .passes.remove import remove as remove
from .passes.rename import rename as rename
from .passes.save import push_to_hub as push_to_hub
from .passes.save import save as save
from .passes.swap import swap as swap
from .passes.verify import verify as verify
from .planning.plan import Entry as Entry
from .planning.plan import Plan as Plan
from .rules.rule import Rule as Rule
from .runtime.folder import ExportReport as ExportReport
from .runtime.session import Session as Session
from .store.merge_files import MergedFiles as MergedFiles
from .store.merge_files import merge_files as merge_files
from .train.groups import parameter_groups as parameter_groups
from .train.pac import PAC as PAC
from .train.penalty import add_penalties as add_penalties
from .train.penalty import penalty as penalty
from .train.trainer import AdapterCallback as AdapterCallback

# -- generated: the methods, one a file
from .methods.blora import BLoRA as BLoRA
from .methods.dora import DoRA as DoRA
from .methods.lora import LoRA as LoRA
from .methods.melora import MELoRA as MELoRA
from .methods.olora import OLoRA as OLoRA
from .methods.pissa import PiSSA as PiSSA
from .methods.rlora import RLoRA as RLoRA
from .methods.vera import VeRA as VeRA
# -- end of generated

__version__: str

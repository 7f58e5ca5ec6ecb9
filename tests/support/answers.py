"""The answer key: which weights of a transformers model make queries, keys, values and so on, told by their names.

Written by hand from names and modeling sources, to judge a matcher that sees neither. A weight's owner is the class
of the module that holds its layer (`LlamaAttention`), its attribute the path from there (`q_proj`; a bare parameter
has an @ before its name). A line of the table reads `owner  roles=attribute ...`, in regular expressions that must
match whole; the first cell that fits decides, and `-` says no role.

Roles: q k v o, gate up down, experts.gate experts.up experts.down, router, and four that set other weights apart:
latent (chained with another projection that is nearer to the core), constant (would make q, k, v or o, but reads
parameters only), mixer (linear layers of what mixes tokens without softmax(qk)v), conv (blocks of a CNN).
"""

from __future__ import annotations

import re
from collections import defaultdict
from functools import cache

from torch import nn

# Containers and one-layer wrappers: their parent is the owner.
WRAPPERS = re.compile(
    r"ModuleList|ModuleDict|Sequential|KyutaiSpeechToTextLinear|MoshiLinear|MLPLayerWithBN|MobileViTV2ConvLayer"
    r"|ConvActivation|ConvDropoutLayerNorm|Inkling2?ShortConvolution"
)

# Told by the parameter's full name, `model class/name`, before the table below.
PLACES = r"""
# Stacks that start from latents: what the first layer projects is a parameter.
Blip2ForC\w+/.*qformer\.encoder\.layer\.0\.attention\..*                            constant=weight
GraniteSpeech\w+/.*qformer\.encoder\.layer\.0\.attention\..*                        constant=weight
Perceiver\w+/.*\.(decoding_)?cross_attention\.attention\.self\.query\..*            constant=weight
Idefics2\w+/.*\.perceiver_resampler\.layers\.0\.self_attn\.q_proj\..*               constant=weight
Evolla\w+/.*\.sequence_compressor_resampler\.layers\.0\.0\.to_q\..*                 constant=weight
Kosmos2\w+/.*\bimage_to_text_projection\.x_attn\.q_proj\..*                         constant=weight
# Experts that are modules of their own.
\w+/.*\.experts\.\w+\.(fc1|wi)\.weight                                              experts.up=weight
\w+/.*\.experts\.\w+\.(fc2|wo)\.weight                                              experts.down=weight
# The class of an MLP, used as a projector.
Idefics2\w+/.*\.modality_projection\..*                                             -=weight
Ernie4_5_VL\w+/.*\.resampler_model\..*                                              -=weight
"""

MIXERS = r"""
\w*(Mamba|Mamba2|Bamba|FalconH1)Mixer|\w+MambaLayer                 mixer=\w*_proj
\w*(GatedDeltaNet|DeltaAttention|TextLinearAttention|ForgetGate)    mixer=\w+_proj\w*
MiniMaxLightningAttention                                           mixer=qkv_proj|out_proj|output_gate
\w+ShortConv                                                        mixer=in_proj|out_proj
RecurrentGemmaRecurrentBlock                                        mixer=linear_(x|y|out)
RecurrentGemmaRglru                                                 mixer=@(input|recurrent)_gate_weight
RwkvSelfAttention                                                   mixer=key|value|receptance|output
xLSTMLayer                                                          mixer=[qkv]|[iof]gate_preact|out_proj
FocalNetModulation                                                  mixer=projection_(in|out|context)
SwiftFormerEfficientAdditiveAttention                               mixer=to_query|to_key|proj|final
# The softmax runs over one score per token, with no key.
MobileViTV2LinearSelfAttention                                      mixer=(qkv_proj|out_proj)\.convolution
# Dynamic convolution, beside an attention core that follows the vocabulary.
ConvBertSelfAttention                                               mixer=conv_kernel_layer|conv_out_layer
# YOSO weighs values by the expected number of hash collisions, in a custom autograd function.
YosoSelf(Attention|Output)                                          mixer=query|key|value|dense
"""

ODD_ATTENTION = r"""
# Residuals around a convolution let the linear layers reach the core too: q is conv(q, k) + (q + k) / 2.
ZayaCCAProjection                        -=conv_qk_depthwise  q,k=q_proj|k_proj|conv_qk_grouped  v=v_proj_\w+
# A convolution of each channel by itself projects nothing.
Inkling2?(Sliding)?Attention             -=[kv]_sconv\.conv1d  k=k_proj  v=v_proj
# One shared head is both key and value, some of it pooled by the compressor; the output takes two steps.
DeepseekV4Attention                      o=o_a_proj  latent=o_b_proj
DeepseekV4(CSA|HCA)Compressor            k,v=kv_proj
# The rows of an output gate, beside those of the query.
AXK2Attention                            q=q_gate_proj
# A mixture of attention heads: every expert has its own query and output.
JetMoeMoA                                q=input_linear  o=output_linear
# Projections before and behind those of nn.MultiheadAttention, which here always pools by a learned query.
AriaCrossAttention                       latent=[qkv]_proj|linear
MultiheadAttention                       k,v,constant=@in_proj_weight
VideoPrismMultiheadAttentionPoolingHead  constant=q_proj
# Text and layout each attend by the sum of both scores.
LiltSelfAttention                        q=(layout_)?query  k=(layout_)?key  v=(layout_)?value
# Words and entities have queries of their own; so have global tokens, in a second core.
LukeSelfAttention                        q=(w2e_|e2w_|e2e_)?query
(LEDEncoder|Longformer)SelfAttention     q=query(_global)?  k=key(_global)?  v=value(_global)?
LSHSelfAttention                         q,k=query_key
EvollaSequenceAlignerCrossAttention      k=key_\w+  v=value_\w+
LevitAttention\w*                        q=queries\.linear  k,v=keys_values\.linear  q,k,v=queries_keys_values\.linear
SqueezeBertModule                        o=post_attention\.conv1d
NeoMMESigmoidGatedProjection             o=o_proj
JanusVQVAEAttnBlock                      o=proj_out
"""

# Off the residual stream: projectors, mergers of patches, adapters, conditioning.
NO_MLP = r"""
# The language adapters of X-MOD are bottlenecks with a residual of their own: small MLPs.
XmodAdapter                                                                   up=dense1  down=dense2
\w*(Projector|ProjectorMLP|PatchMerger|AlignerMLP|Adapter|PatchEmbeddings)    -=.*
AXK2GateMLP|VibeVoiceDiffusionHeadMLP|Llama4VisionMLP2                        -=.*
"""

ODD_MLP = r"""
# Fused: the rows of gate and up in one weight.
(Moshi|KyutaiSpeechToText)GatingMLP|MoonshineDecoderMLP    gate,up=fc1
ModernBert(Decoder)?MLP                                    gate,up=Wi
Granite\w+MLP                                              gate,up=input_linear
# act(gate) * up
Lfm\w+MLP                                                  gate=w1  up=w3  down=w2
CpmAnt(DenseGatedACT|FeedForward)                          gate=w_0  up=w_1  down=w_out
xLSTMFeedForward                                           gate=proj_up_gate  up=proj_up  down=proj_down
# Channel mixing: receptance gates value(relu(key) ** 2) on its way to the residual.
RwkvFeedForward                                            up=key  down=value
# Patches are merged, yet their mean bypasses the two layers: a residual.
MiniCPM\w+ViTWindowAttentionMerger                         up=linear_1  down=linear_2
AlbertLayer                                                up=ffn  down=ffn_output
EncoderLayer                                               up=ffn\.0  down=ffn\.2
SqueezeBertModule                                          up=intermediate\.conv1d  down=output\.conv1d
ReformerFeedForwardDense                                   up=dense
ProphetNetFeedForward                                      up=intermediate  down=output
XLNetFeedForward                                           up=layer_1  down=layer_2
LevitMLPLayer                                              up=linear_up\.linear  down=linear_down\.linear
PoolFormerOutput                                           up=conv1  down=conv2
MobileViTV2FFN                                             up=conv1\.convolution  down=conv2\.convolution
ConvNext(V2)?Layer                                         up=pwconv1  down=pwconv2
SwiftFormer(ConvEncoder|LocalRepresentation)               up=point_wise_conv1  down=point_wise_conv2
PerceiverMLP|PvtFFN|PvtV2ConvFeedForwardNetwork            up=dense1  down=dense2
(GPTJ|CodeGen)MLP                                          up=fc_in  down=fc_out
"""

EXPERTS = r"""
\w+Experts                        experts.gate,experts.up=@gate_up_proj  experts.gate=@gate_proj  experts.up=@up_proj
\w+Experts                        experts.down=@down_proj
JetMoeMoE                         experts.gate,experts.up=input_linear  experts.down=output_linear
JetMoeTopKGating                  router=layer
HunYuanMoEV1Gate                  router=wg
# The last of a chain of four.
ZayaRouter|ZayaRouterMLP          router=out_proj  -=.*
\w+Router                         router=classifier|gate
\w*(MoE|Moe|MoeBlock|MoEBlock|MoELayer|GptOssMLP)    router=gate|router
"""

CNNS = r"""
(AlignVision|EfficientNet)\w+Layer    conv=.*
(MobileNet|MobileViT|ResNet|RegNet|HGNet|TextNet|PPLCNet|Bit)\w*    conv=.*(conv|attention)\w*(\.\d+|\.convolution)?
"""

# What most architectures follow.
ATTENTION = r"\w*(Attention|Attn|MLA|PoolingHead)\w*(?<!Merger)"
VOCABULARY = rf"""
{ATTENTION}  q=(q_proj|q)(\.linear)?|@q|q_lin|q_head|q_b_proj|query|query_proj|linear_q|to_q|project_q|Wq
{ATTENTION}  k=(k_proj|k)(\.linear)?|@k|k_lin|k_head|key|key_proj|linear_k|project_k|Wk
{ATTENTION}  v=(v_proj|v)(\.linear)?|@v|v_lin|v_head|value|value_proj|linear_v|project_v|Wv
{ATTENTION}  q=projection_query  k=projection_key  v=projection_value
{ATTENTION}  q,k,v=qkv|qkv_proj|query_key_value|c_attn|Wqkv|in_proj  k,v=kv_proj|to_kv|kv_b_proj
{ATTENTION}  latent=q_a_proj  latent,rope=kv_a_proj_with_mqa
{ATTENTION}  o=(o_proj|projection)(\.linear)?|o|@o|out_proj|out_lin|c_proj|Wo|to_out|post_proj|attention_out
{ATTENTION}  o=linear_out|dense|output|proj|projection_layer
\w+SelfOutput                     o=dense
\w*Intermediate                   up=dense
\w*Output                         down=dense
\w*(MLP|Mlp)                      gate=gate_proj  down=c_proj|Wo|output_linear
\w*(MLP|Mlp|FeedForward)          gate,up=gate_up_proj  up=up_proj  down=down_proj
\w*(FeedForward|FFN)              up=linear_?1  down=linear_?2
\w+                               gate=wi_0  up=wi|wi_1  down=wo
\w+                               up=fc1|c_fc|lin1|linear_fc1|dense_h_to_4h|intermediate_dense
\w+                               down=fc2|lin2|linear_fc2|dense_4h_to_h|output_dense
"""
TABLE = MIXERS + ODD_ATTENTION + NO_MLP + ODD_MLP + EXPERTS + CNNS + VOCABULARY


def answers(model: nn.Module) -> dict[str, frozenset[str]]:
    """The weights of every role, by parameter name; a weight with several names goes by the first."""
    modules = dict(model.named_modules())
    found: defaultdict[str, set[str]] = defaultdict(set)
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            continue
        roles = _fit(PLACES, f"{type(model).__name__}/{name}", "weight") or _fit(TABLE, *label(name, modules)) or ()
        for role in roles:
            if role != "rope":
                found[role].add(name)
            elif weight.shape[0] > modules[name.replace("kv_a_proj_with_mqa.weight", "kv_b_proj")].in_features:
                found["k"].add(name)  # rows of its own besides the latent: they become part of every key
    found.pop("-", None)
    return {role: frozenset(names) for role, names in found.items()}


def attends(model: nn.Module) -> bool:
    """Whether the model has an attention core, softmax(qk)v, of any kind."""
    return not answers(model).keys().isdisjoint("qkv")


def label(name: str, modules: dict[str, nn.Module]) -> tuple[str, str]:
    """The owner's class and the attribute of a parameter."""
    *path, leaf = name.split(".")
    attribute = [path.pop() if leaf == "weight" else f"@{leaf}"]
    while path and WRAPPERS.fullmatch(type(modules[".".join(path)]).__name__):
        attribute.insert(0, path.pop())
    return type(modules[".".join(path)]).__name__, ".".join(attribute)


@cache
def _fit(table: str, owner: str, attribute: str) -> tuple[str, ...] | None:
    cells = (roles for who, what, roles in _cells(table) if who.fullmatch(owner) and what.fullmatch(attribute))
    return next(cells, None)


@cache
def _cells(table: str) -> list[tuple[re.Pattern[str], re.Pattern[str], tuple[str, ...]]]:
    found = []
    for line in table.splitlines():
        if line and not line.startswith("#"):
            owner, *cells = line.split()
            for roles, _, attribute in (cell.partition("=") for cell in cells):
                found.append((re.compile(owner), re.compile(attribute), tuple(roles.split(","))))
    return found

"""A training script such as upstream ships beside the library: nothing in it is ours, and nothing knows of STP.

What it takes from its arguments is ``--spec``, like any script for hybrid models. It leaves the loss of each
microbatch in the file that the environment variable STOCK_LOSSES names.
"""

import json
import os
from functools import partial

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import get_blend_from_list
from megatron.core.enums import ModelType
from megatron.training import get_args, get_tokenizer, pretrain
from megatron.training.argument_utils import hybrid_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args


def datasets(sample_counts, vp_stage=None):
    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=None,
        blend_per_split=[
            get_blend_from_list(paths) for paths in (args.train_data_path, args.valid_data_path, args.test_data_path)
        ],
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        mmap_bin_files=args.mmap_bin_files,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, sample_counts, lambda: True, config).build()


datasets.is_distributed = True


def loss_of(mask, training, per_token):
    mask = mask.reshape(-1).float()
    total, tokens = (per_token.reshape(-1).float() * mask).sum(), mask.sum().to(torch.int)
    if training:
        with open(os.environ["STOCK_LOSSES"], "a") as file:
            file.write(json.dumps([total.item(), tokens.item()]) + "\n")
    return total, tokens, {"lm loss": torch.stack((total.detach(), tokens.float()))}


def forward_step(iterator, model):
    batch = next(iterator)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], loss_mask=batch["loss_mask"])
    return output, partial(loss_of, batch["loss_mask"], model.training)


def main():
    args = parse_and_validate_args()
    config = pretrain_cfg_container_from_args(args, hybrid_config_from_args(args))
    pretrain(config, datasets, ModelType.encoder_or_decoder, forward_step)


if __name__ == "__main__":
    main()

#!/usr/bin/env bash
# The ablation of the inference modes: baseline, policy, guidance, both at equal numbers of steps, as a table and a plot.
#   CHECKPOINT=output_dir/heads OUT=output_dir/ablation bash scripts/ablate_infer_mode.sh
# Without CHECKPOINT four heads are trained by --objective token on the quickstart's base, which does not make them win.
# Digits (default): 4 modes x 4, 8, 16 steps x cfg 1, 1.5 x 3 seeds = 72 settings of 600 images, 25 diffusion steps,
# about 10 minutes on 2 CPU cores. Interrupted, the same command continues; finished settings are skipped.
#   PRESET=mar_base CHECKPOINT=DIR IMAGENET_PATH=DIR GPUS=8 bash scripts/ablate_infer_mode.sh
# ImageNet 256: 4 modes x 16, 32, 64 steps at cfg 2.9, 50,000 images each, 100 diffusion steps, on all GPUs.
# Further arguments go to sample.py, where the last one counts: bash scripts/ablate_infer_mode.sh --infer_mode baseline --seed 0
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

preset=${PRESET:-digits}
out=${OUT:-$(out_of ablation "$preset")}
case $preset in
    digits)
        checkpoint=${CHECKPOINT:-$out/heads}
        [ -n "${CHECKPOINT:-}" ] || run python main_mar.py --preset digits --init_from output_dir/quickstart \
            --freeze_backbone --no-train_diffloss --learn order,group,tau,cfg --mask_ratio_min 0 --mask_ratio_per_image \
            --epochs 6 --warmup_epochs 0 --output_dir "$checkpoint" --resume "$checkpoint"
        run python sample.py --checkpoint "$checkpoint" --output_dir "$out" \
            --infer_mode baseline,policy,guidance,both --num_iter 4,8,16 --cfg 1.0,1.5 --seed 0,1,2 \
            --num_images 600 --num_sampling_steps 25 "$@"
        ;;
    mar_base)
        gpus=$(num_gpus)
        run torchrun --nproc_per_node="$gpus" sample.py --checkpoint "${CHECKPOINT:-output_dir/mar_base}" \
            --output_dir "$out" --data_path "${IMAGENET_PATH:-data/imagenet}" \
            --infer_mode baseline,policy,guidance,both --num_iter 16,32,64 --cfg 2.9 --seed 0 \
            --num_images 50000 --eval_bsz 256 --num_sampling_steps 100 "$@"
        ;;
    *) fail "unknown PRESET '$preset'; valid: digits, mar_base" ;;
esac

into "$out/table.md" python scripts/make_table.py "$out/results.jsonl" --csv "$out/table.csv" \
    --plot "$out/fid_by_evals.png"
say "table: $out/table.md and table.csv, plot: $out/fid_by_evals.png"

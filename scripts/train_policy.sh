#!/usr/bin/env bash
# Train the backbone on the states that an order visits, with or without heads, and compare: second stages from one
# checkpoint, each for about the same time, sampled at several numbers of steps, as a table and a plot.
#   random   published masks: the checkpoint is trained as before
#   visited  the states and next groups of the best hand-made order, low-discrepancy
#   anneal   as visited, into which random masks fade over the first half of its epochs (--mix_anneal)
#   policy   as visited for four fifths of its epochs, then the states and next groups of the heads named in LEARN, which
#            are trained together with the backbone from that epoch on (--heads_from)
#   early    as policy, with heads from the start
#   joint    the states of visited; a group head is trained beside the backbone, without a scoring pass
# After them, for digits, the whole pipeline stage by stage, each at the same evaluations beside the hand-made rules on the
# backbone of anneal, on the reward's features and a judge's: the second part of docs/leaderboard.md.
#   random    the checkpoint trained as before, the published rules
#   anneal    on the backbone of anneal its order, the published group sizes, tau and w
#   searched  the same with a schedule by scripts/search_schedule.py
#   heads     the same with heads by --objective image, around hand-made rules
#   pipeline  the same with heads around the searched schedule
#   INIT=output_dir/quickstart OUT=output_dir/policy SEEDS="1 2 3" bash scripts/train_policy.sh
# Digits (default): without INIT the base is trained first; 3 training seeds, each sampled with a seed of its own.
#   PRESET=cifar10 DATA="--data_path data" bash scripts/train_policy.sh
#   PRESET=mar_base INIT=pretrained_models/mar/mar_base DATA="--data_path IMAGENET" GPUS=8 bash scripts/train_policy.sh
# ARMS names the masks to compare, STAGES those of the pipeline, LEARN the heads of policy and early. SEEDS are those of
# training, IMAGE_SEEDS those of the images of the pipeline (default: that of the training). EPOCHS is that of random,
# visited and anneal; policy and joint get 93 % of it, early 72 %, since their steps take longer (scripts/bench_training.py
# --only heads). Finished parts are not run again. On 2 CPU cores the masks take an hour and a half, and the pipeline as
# long for each seed; ARMS= or STAGES= leaves them out.
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

preset=${PRESET:-digits}
out=${OUT:-$(out_of policy "$preset")}
learn=${LEARN:-group}
launcher=(python)
stages=
case $preset in
    digits)
        init=${INIT:-output_dir/quickstart} epochs=${EPOCHS:-45} steps=2,4,8,16 range=2,16
        stage=(--warmup_epochs 1 --eval_freq 1000)
        sampling=(--cfg 1,1.25,1.5 --num_images 1800)
        stages=${STAGES-random anneal searched heads pipeline}
        ;;
    cifar10)
        init=${INIT:-output_dir/cifar10} epochs=${EPOCHS:-30} steps=2,4,8,16 range=2,16
        stage=(--warmup_epochs 1 --eval_freq 1000)
        sampling=(--cfg 1,1.5 --num_images 5000 --num_sampling_steps 50 --features cifar10)
        ;;
    mar_base)
        gpus=$(num_gpus)
        init=${INIT:-pretrained_models/mar/mar_base} epochs=${EPOCHS:-10} steps=8,16,32,64 range=8,64
        stage=(--warmup_epochs 1 --blr 2e-5 --eval_freq 1000)
        sampling=(--cfg 2.9 --num_images 50000 --eval_bsz 256)
        launcher=(torchrun --nproc_per_node="$gpus")
        ;;
    *) fail "unknown PRESET '$preset'; valid: digits, cifar10, mar_base" ;;
esac
read -ra data <<<"${DATA:-}"

if [[ -z ${INIT:-} && $preset != mar_base ]]; then
    run "${launcher[@]}" main_mar.py --preset "$preset" "${data[@]}" --output_dir "$init" --resume "$init" "$@"
fi
results=()
for arm in ${ARMS-random visited anneal policy early joint}; do
    case $arm in
        random) share=100 masks=(--train_masks random) ;;
        visited) share=100 masks=(--train_masks visited --train_targets next --order halton) ;;
        anneal)
            share=100 masks=(--train_masks visited --train_targets next --order halton --mix_anneal $((epochs / 2)))
            ;;
        joint)
            share=93 masks=(--train_masks visited --train_targets next --learn group --order halton --order_base halton)
            ;;
        policy | early)
            share=72 masks=(--train_masks policy --train_targets next --learn "$learn" --order_base halton)
            [[ $arm == policy ]] && share=93 masks+=(--heads_from $((epochs * 73 / 100)))
            [[ ,$learn, == *,order,* ]] || masks+=(--order halton)
            ;;
    esac
    mode=policy
    [[ $arm == random || $arm == visited || $arm == anneal ]] && mode=baseline
    for seed in ${SEEDS:-1 2 3}; do
        model=$out/$arm/seed$seed
        num_epochs=$((epochs * share / 100))
        run "${launcher[@]}" main_mar.py --preset "$preset" "${data[@]}" --init_from "$init" --train_num_iter $range \
            "${stage[@]}" --epochs $num_epochs --seed "$seed" --output_dir "$model" --resume "$model" \
            "${masks[@]}" "$@"
        run "${launcher[@]}" sample.py --checkpoint "$model" --output_dir "$out/$arm" --infer_mode $mode --num_iter $steps \
            --seed "$seed" "${sampling[@]}"
    done
    results+=("$out/$arm/results.jsonl")
done
if [[ -n ${results[*]} ]]; then
    into "$out/table.md" python scripts/make_table.py "${results[@]}" --csv "$out/table.csv" \
        --plot "$out/fid_by_evals.png"
    run python scripts/plot_training.py "$out"/*/seed*/ --out "$out/curves.png"
    say "table: $out/table.md and table.csv, plot: $out/fid_by_evals.png, training: $out/curves.png"
fi

[ -n "$stages" ] || exit 0
pass=() # --dry_run goes on to the scripts that this one calls
[ -z "$dry_run" ] || pass=(--dry_run)
budget=(--num_sampling_steps 8 --solver dpmpp_sde)
judge=$out/pipeline/judge.npz
[ -f "$judge" ] || run python scripts/train_classifier.py --seed 1 --output "$judge"

measure() { # STAGE NUM_ITER CHECKPOINT flags
    run python sample.py --checkpoint "$3" --output_dir "$out/pipeline/$1" --num_iter "$2" "${budget[@]}" \
        --num_images 1800 --metrics fid --features digits --judge "$judge" --seed "${IMAGE_SEEDS:-$seed}" "${@:4}"
}
heads() { # STAGE CHECKPOINT flags: train them, measure them
    local model=$out/pipeline/$1/seed$seed
    BASE=$2 OUT=$model SEED=$seed bash scripts/train_heads.sh "${pass[@]}" --order halton \
        --learn group,tau,cfg,profile --epochs 30 "${@:3}"
    measure "$1" 4,8 "$model" --infer_mode both
}
for seed in ${SEEDS:-1 2 3}; do
    annealed=$out/anneal/seed$seed
    schedule=$out/pipeline/schedule$seed.json
    for number in 4 8; do # hand-made rules are chosen on the first backbone
        grid=$out/pipeline/grid$number
        [ -f "$grid/best.jsonl" ] || GRID=small NUM_ITER=$number CHECKPOINT=$annealed OUT=$grid JUDGE=$judge \
            SEEDS=$seed bash scripts/search_grid.sh "${pass[@]}" --order halton
        measure hand $number "$annealed" --settings_of "$grid/best.jsonl" --order halton
    done
    for stage in $stages; do
        case $stage in
            random) measure random 4,8 "$out/random/seed$seed" --infer_mode baseline ;;
            anneal) measure anneal 4,8 "$annealed" --infer_mode baseline ;;
            searched | pipeline)
                [ -f "$schedule" ] || run python scripts/search_schedule.py --checkpoint "$annealed" --out "$schedule" \
                    --num_iter 4 "${budget[@]}" --order halton --reward_weights 1,3 --seed 100
                if [[ $stage == searched ]]; then
                    measure searched 4,8 "$annealed" --infer_mode baseline --schedule "$schedule"
                else
                    heads pipeline "$annealed" --schedule "$schedule"
                fi
                ;;
            heads) heads heads "$annealed" ;;
            *) fail "unknown stage '$stage' in STAGES; valid: random, anneal, searched, heads, pipeline" ;;
        esac
    done
done
rows=()
[[ " $stages " != *" anneal "* ]] || rows+=(--hand "$out/pipeline/anneal/results.jsonl") # published rules are hand-made too
for stage in $stages; do
    rows+=(--row "$stage=$out/pipeline/$stage/results.jsonl")
done
into "$out/pipeline/table.md" python scripts/make_leaderboard.py --page cotrained \
    --hand "$out/pipeline/hand/results.jsonl" "${rows[@]}"

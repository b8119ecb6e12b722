#!/usr/bin/env bash
# Set up; train mar_tiny on scikit-learn's digits, then its heads, by --objective image on the frozen model; sample with
# all inference modes and a small grid of hand-made settings, and compare them by features that were not optimised; draw
# how images grow under the heads. Finished parts are not run again.
#   bash scripts/quickstart.sh [--output_dir DIR] [--epochs N] [--seed S,… of the comparison] [--dry_run] [other flags]
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

out=output_dir/quickstart
epochs=()
training=()
heads=()
sampling=()
images=(--num_images 600)
seeds=(--seed 1,2)
rules=()
groups=(--group staged)
base=(--group_base staged)
split "$@"
for ((i = 0; i < ${#words[@]}; i++)); do
    case ${words[i]} in
        --output_dir) out=${words[i + 1]-} && i=$((i + 1)) ;;
        --epochs) epochs=(--epochs "${words[i + 1]-}") && i=$((i + 1)) ;;
        --order | --group | --group_[ap] | --tau_schedule | --temperature_end | --cfg_schedule | --cfg_power | \
            --cfg_profile | --cfg_*interval) # of hand-made rules, not of what is learned
            rules+=("${words[i]}" "${words[i + 1]-}") && i=$((i + 1))
            ;;
        --cfg | --temperature | --num_iter | --num_sampling_steps | --solver)
            sampling+=("${words[i]}" "${words[i + 1]-}")
            first=${words[i + 1]-}
            training+=("${words[i]}" "${first%%,*}") # samples may be of several, training is for the first
            [[ ${words[i]} != --num_iter || ,${words[i + 1]-}, != *,[12],* ]] || groups=() base=() # staged needs three
            i=$((i + 1))
            ;;
        --schedule | --eval_bsz | --device | --dtype)
            sampling+=("${words[i]}" "${words[i + 1]-}")
            training+=("${words[i]}" "${words[i + 1]-}")
            i=$((i + 1))
            ;;
        --reward | --reward_weights | --bank | --pathwise | --adaptive_lr)
            heads+=("${words[i]}" "${words[i + 1]-}") && i=$((i + 1))
            ;;
        --seed) seeds=(--seed "${words[i + 1]-}") && i=$((i + 1)) ;;
        --num_images) images=(--num_images "${words[i + 1]-}") && i=$((i + 1)) ;;
        *) training+=("${words[i]}") ;;
    esac
done
[ "$i" -le "${#words[@]}" ] || fail "${words[-1]} needs a value"

# What is called below, but for the places that do not exist yet; a wrong flag of the last is an error before the first.
base_model=(python main_mar.py --preset digits --eval_freq 1000 "${training[@]}" "${epochs[@]}" --output_dir "$out")
budget=(--num_iter 4 --num_sampling_steps 8 --solver dpmpp_sde)
policy=(python main_mar.py --preset digits --objective image --learn order,group,tau,cfg,profile "${budget[@]}" "${base[@]}"
    --cfg 1.8 --temperature 0.9 --reward digits,pixels --reward_weights 1,4 --bank 512 --lr 2.4e-2 --adaptive_lr 0.03
    --batch_size 128 --no-grad_checkpointing --epochs 2 "${training[@]}" "${heads[@]}" "${epochs[@]}" --output_dir "$out/heads")
# Another classifier than the one of the reward judges. Hand-made settings are chosen by the judge itself.
judge=$out/judge.npz
shared=("${budget[@]}" "${sampling[@]}" "${images[@]}" "${seeds[@]}" --features digits --judge "$judge")
hand=(python sample.py --infer_mode baseline "${groups[@]}" "${rules[@]}" --cfg 1.2,1.5 --temperature 0.85,0.95 "${shared[@]}"
    --metrics fid)
modes=(python sample.py --infer_mode baseline,guidance "${groups[@]}" "${shared[@]}" --metrics fid)
learned=(python sample.py --infer_mode policy,both "${shared[@]}" --metrics fid,isc,kid,prc --save_trace 10)

if [ ! -f "$out/heads/checkpoint-last.pth" ]; then
    check "${policy[@]}"
    check "${hand[@]}"
    check "${learned[@]}"
fi
run "${base_model[@]}" --resume "$out"
run "${policy[@]}" --init_from "$out" --resume "$out/heads"
[ -f "$judge" ] || run python scripts/train_classifier.py --seed 1 --epochs 20 --no-held_out --output "$judge"
run "${hand[@]}" --checkpoint "$out/heads" --output_dir "$out/hand"
run "${modes[@]}" --checkpoint "$out/heads" --output_dir "$out/modes"
into "$out/figures.md" "${learned[@]}" --checkpoint "$out/heads" --output_dir "$out/modes"
both=$(sed -n 's/^picture: \(.*\)\/grid\.png$/\1/p' "$out/figures.md" 2>/dev/null | tail -n 1) || true
both=${both:-$out/modes/both_*}
run python scripts/plot_trace.py "$both/trace.npz" --out "$out/trace" --images 0
say
into "$out/table.md" python scripts/make_leaderboard.py --hand "$out/hand/results.jsonl" --row "$out/modes/results.jsonl"
say
say "how images grow: $out/trace"
say "picture: $both/grid.png"

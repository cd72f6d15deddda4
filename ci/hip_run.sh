#!/usr/bin/env bash
# Runs a command inside a root made by hip_root.sh:
#
#     ci/hip_run.sh ROOT COMMAND...
#
# The source tree, the current directory, the temporary directory and the paths in HIP_BIND
# (separated by colons) are visible inside at their own absolute paths, so that paths in arguments,
# messages and dependency files mean the same on both sides. The exit status is the command's. ROOT
# itself is left as it was: the directories that the paths need exist in memory only.
set -euo pipefail

die() {
  printf 'hip_run: %s\n' "$*" >&2
  exit 125
}

# has_files DIR: whether there is anything below DIR but directories.
has_files() { [[ -n $(find "$1" -mindepth 1 ! -type d -print -quit) ]]; }

# bind ROOT PATH: makes PATH visible inside ROOT.
bind() {
  local inside=$1$2
  [[ -d $2 ]] || die "HIP_BIND and the directories used must be directories, got '$2'"
  [[ ! $2 -ef $inside ]] || return 0 # lies in a directory that is bound already
  mkdir -p "$inside"
  ! has_files "$inside" || die "$2 cannot be seen inside: the root has files of its own there"
  mount --bind "$2" "$inside"
}

[[ $# -ge 2 ]] || die "expected ROOT COMMAND..., got '$*'"

if [[ $1 != --inside ]]; then
  root=$(realpath -m "$1")
  [[ -e $root/.hip-root-ready ]] || die "$root is no finished root; make it with ci/hip_root.sh"
  # A mount namespace of its own: the mounts vanish with the command, however it ends.
  options=(--mount)
  [[ $(id -u) -eq 0 ]] || options+=(--map-root-user)
  exec unshare "${options[@]}" -- "$(realpath "$0")" --inside "$root" "${@:2}"
fi

origin=$2
shift 2
# What is changed into is in memory and holds the root's directories, so that others can be made
# beside them. Those without files, /tmp and /home as a rule, are made anew.
root=$origin/mnt
mount -t tmpfs -o mode=755 hip_run "$root"
for path in "$origin"/*; do
  inside=$root/${path##*/}
  if [[ -L $path ]]; then
    cp -P "$path" "$inside"
  elif [[ -d $path && $path != "$root" ]]; then
    mkdir "$inside"
    [[ $path == "$origin/tmp" ]] || ! has_files "$path" || mount --bind "$path" "$inside"
  fi
done
mount --rbind /proc "$root/proc" # hipcc finds its own files through it
mount --rbind /dev "$root/dev"
IFS=: read -r -a paths <<<"${HIP_BIND:-}"
paths+=("${TMPDIR:-/tmp}" "$(dirname "$0")/.." "$PWD")
# A directory sorts before those in it, and shows them.
while read -r path; do
  [[ $path == / ]] || bind "$root" "$path"
done < <(for path in "${paths[@]}"; do [[ -z $path ]] || realpath "$path"; done | sort -u)

# Programs of the host would run against the wrong libc, and its HIP installation, if there is one,
# is not this one. LLVM's tools lie in a directory with a version in its name.
tools=$(cd "$root" && echo usr/lib/llvm-*/bin)
exec chroot "$root" /usr/bin/env --chdir="$PWD" \
  --unset=LD_LIBRARY_PATH --unset=LD_PRELOAD --unset=PYTHONPATH --unset=PYTHONHOME \
  --unset=HIP_PATH --unset=ROCM_PATH --unset=HIP_DEVICE_LIB_PATH --unset=HIP_CLANG_PATH \
  PATH="/usr/sbin:/usr/bin:/sbin:/bin:/$tools" LC_ALL=C.UTF-8 "$@"

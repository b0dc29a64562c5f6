#!/bin/sh
# Installs what the tests of this folder need, on Debian and its kin as root: SLURM, munge, PMIx, ssh, network namespaces.
# Where that cannot be, it says so in one line and the tests are skipped. Nothing that is installed is started.
packages="slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge libpmix2 openssh-server openssh-client iproute2 util-linux"
PATH=$PATH:/usr/sbin:/sbin

missing=
for program in slurmctld slurmd srun munged sshd ssh ip unshare; do
    command -v $program > /dev/null || missing="$missing $program"
done
if [ -z "$missing" ]; then
    exit 0
elif [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
    echo "tests/cluster will be skipped: installing$missing for them takes root and apt-get"
    exit 0
fi
log=$(mktemp)
# This file keeps the packages from starting their services.
policy=/usr/sbin/policy-rc.d
[ -e $policy ] || { printf '#!/bin/sh\nexit 101\n' > $policy && chmod +x $policy && trap 'rm -f $policy' EXIT; }
echo "installing for tests/cluster what is missing:$missing"
if ! { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $packages; } > "$log" 2>&1; then
    echo "tests/cluster will be skipped: apt-get failed ($(grep -m 1 '^E:' "$log"))"
fi
rm -f "$log"

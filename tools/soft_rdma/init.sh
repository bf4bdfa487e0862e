#!/bin/sh
# The guest's first process: modules, the host's root under a layer of memory, then the job in it.
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
while read -r module; do
    insmod "/modules/$module" || echo "soft-rdma: $module is not loaded"
done </order
mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro host /host
mount -t tmpfs -o mode=755 memory /memory
mkdir /memory/upper /memory/work
mount -t overlay -o lowerdir=/host,upperdir=/memory/upper,workdir=/memory/work overlay /root
mount -t proc proc /root/proc
mount -t sysfs sysfs /root/sys
mount -t devtmpfs dev /root/dev
mkdir -p /root/dev/shm /root/dev/pts
mount -t tmpfs -o mode=1777 memory /root/dev/shm
mount -t devpts devpts /root/dev/pts
cat /job >/root/run/soft-rdma-job
chroot /root /bin/sh /run/soft-rdma-job </dev/null
echo "$?" >/dev/ttyS1
poweroff -f

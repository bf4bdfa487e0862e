# Sourced by the job. Two ends of a wire in one machine, an RDMA device on each. Soft-RoCE knows the first network
# namespace alone, so that both ends are in it: rules of routing, asked before the table of local addresses, send what
# is for the other end over the wire.
ip link set lo up
ip link add mxa type veth peer name mxb
for end in all mxa mxb; do
    echo 1 >/proc/sys/net/ipv4/conf/$end/accept_local
    echo 0 >/proc/sys/net/ipv4/conf/$end/rp_filter
done
ip address add 10.9.0.1/32 dev mxa
ip address add 10.9.0.2/32 dev mxb
ip link set mxa up
ip link set mxb up
ip rule add pref 10 iif mxa lookup local
ip rule add pref 11 iif mxb lookup local
ip rule add pref 20 lookup 100
ip rule add pref 30 lookup local
ip rule del pref 0
ip route add 10.9.0.2/32 dev mxa src 10.9.0.1 table 100
ip route add 10.9.0.1/32 dev mxb src 10.9.0.2 table 100
rdma link add rxea type rxe netdev mxa
rdma link add rxeb type rxe netdev mxb

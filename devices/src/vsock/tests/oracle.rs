//! rust-vmm's reader of packets agrees with ours.

use proptest::prelude::*;
use virtio_queue::{Queue, QueueT};
use virtio_vsock::packet::VsockPacket;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::super::packet::{HEADER, Header};

const TABLE: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const PACKET: u64 = 0x4000;

proptest! {
    #[test]
    fn headers_are_what_rust_vmm_reads(mut bytes in prop::collection::vec(any::<u8>(), HEADER)) {
        // The other reader looks for the data.
        bytes[24..28].fill(0);
        let bytes: [u8; HEADER] = bytes.try_into().unwrap();
        let header = Header::from_bytes(&bytes);
        prop_assert_eq!(header.to_bytes(), bytes);

        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let mut queue = Queue::new(16).unwrap();
        queue.try_set_desc_table_address(GuestAddress(TABLE)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(AVAILABLE)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
        queue.set_ready(true);
        memory.write_obj(PACKET, GuestAddress(TABLE)).unwrap();
        memory.write_obj(44u32, GuestAddress(TABLE + 8)).unwrap();
        memory.write_obj(1u16, GuestAddress(AVAILABLE + 2)).unwrap();
        memory.write_slice(&bytes, GuestAddress(PACKET)).unwrap();
        let mut chain = queue.pop_descriptor_chain(&memory).unwrap();
        let theirs = VsockPacket::from_tx_virtq_chain(&memory, &mut chain, 1).unwrap();
        prop_assert_eq!(header.src_cid, theirs.src_cid());
        prop_assert_eq!(header.dst_cid, theirs.dst_cid());
        prop_assert_eq!(header.src_port, theirs.src_port());
        prop_assert_eq!(header.dst_port, theirs.dst_port());
        prop_assert_eq!(header.len, theirs.len());
        prop_assert_eq!(header.kind, theirs.type_());
        prop_assert_eq!(&bytes[30..32], &theirs.op().to_le_bytes());
        prop_assert_eq!(header.flags, theirs.flags());
        prop_assert_eq!(header.buf_alloc, theirs.buf_alloc());
        prop_assert_eq!(header.fwd_cnt, theirs.fwd_cnt());
    }
}

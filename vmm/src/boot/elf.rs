//! The parts of an ELF file that matter for booting it: segments, entry, PVH note.
//!
//! The structures are linux-loader's. Its own loader is not used: it writes to guest memory as it
//! reads, and looks at one PT_NOTE segment only, where kernels have several.

use linux_loader::elf::{
    EI_CLASS, EI_DATA, ELFCLASS64, ELFDATA2LSB, Elf64_Ehdr, Elf64_Nhdr, Elf64_Phdr, PT_LOAD,
    PT_NOTE,
};
use vm_memory::ByteValued;

use super::error::LoadError;
use super::file::Source;

pub(super) const MAGIC: [u8; 4] = *b"\x7fELF";

const EM_X86_64: u16 = 62;
/// Xen's name for the note that holds the 32-bit physical entry point of PVH.
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
/// Kernels have a handful; a file with more is not one.
const MAX_SEGMENTS: u16 = 64;
/// Notes of a kernel take a few hundred bytes.
const MAX_NOTES: u64 = 64 * 1024;

pub(super) struct Segment {
    pub(super) address: u64,
    pub(super) offset: u64,
    pub(super) file_size: u64,
    pub(super) memory_size: u64,
}

pub(super) struct Image {
    pub(super) segments: Vec<Segment>,
    pub(super) entry: u64,
    pub(super) pvh_entry: Option<u32>,
}

pub(super) fn parse(source: &Source) -> Result<Image, LoadError> {
    let mut header = Elf64_Ehdr::default();
    source.read_at(0, header.as_mut_slice())?;
    if header.e_ident[EI_CLASS] != ELFCLASS64 {
        return Err(source.not_a_kernel("it is a 32-bit ELF"));
    }
    if header.e_ident[EI_DATA] != ELFDATA2LSB || header.e_machine != EM_X86_64 {
        return Err(source.not_a_kernel("it is an ELF for another processor"));
    }
    if usize::from(header.e_phentsize) != size_of::<Elf64_Phdr>() || header.e_phnum > MAX_SEGMENTS {
        return Err(source.not_a_kernel("its program headers are damaged"));
    }
    let mut image = Image {
        segments: Vec::new(),
        entry: header.e_entry,
        pvh_entry: None,
    };
    for i in 0..u64::from(header.e_phnum) {
        let mut segment = Elf64_Phdr::default();
        let at = header
            .e_phoff
            .checked_add(i * u64::from(header.e_phentsize))
            .ok_or_else(|| source.not_a_kernel("its program headers are damaged"))?;
        source.read_at(at, segment.as_mut_slice())?;
        match segment.p_type {
            PT_LOAD if segment.p_memsz != 0 => {
                if segment.p_filesz > segment.p_memsz {
                    return Err(
                        source.not_a_kernel("a segment is larger in the file than in memory")
                    );
                }
                image.segments.push(Segment {
                    address: segment.p_paddr,
                    offset: segment.p_offset,
                    file_size: segment.p_filesz,
                    memory_size: segment.p_memsz,
                });
            }
            PT_NOTE if image.pvh_entry.is_none() => image.pvh_entry = pvh_note(source, &segment)?,
            _ => {}
        }
    }
    if image.segments.is_empty() {
        return Err(source.not_a_kernel("the ELF has nothing to load"));
    }
    Ok(image)
}

/// The entry point in the notes of one segment. Damaged notes end the search, as in other loaders.
fn pvh_note(source: &Source, segment: &Elf64_Phdr) -> Result<Option<u32>, LoadError> {
    if segment.p_filesz > MAX_NOTES {
        return Ok(None);
    }
    let mut notes = vec![0; usize::try_from(segment.p_filesz).unwrap_or(0)];
    source.read_at(segment.p_offset, &mut notes)?;
    // Names and descriptors are padded to 4 bytes; to 8 in segments that say so.
    let align = if segment.p_align == 8 { 8 } else { 4 };
    let mut rest = notes.as_slice();
    let header_size = size_of::<Elf64_Nhdr>();
    while let Some((head, body)) = rest.split_at_checked(header_size) {
        let mut note = Elf64_Nhdr::default();
        note.as_mut_slice().copy_from_slice(head);
        let padded = |n: u32| usize::try_from(n).ok()?.checked_next_multiple_of(align);
        let (Some(name_room), Some(desc_room)) = (padded(note.n_namesz), padded(note.n_descsz))
        else {
            break;
        };
        let name = usize::try_from(note.n_namesz)
            .ok()
            .and_then(|n| body.get(..n));
        let Some(desc) = body.get(name_room..) else {
            break;
        };
        if name == Some(b"Xen\0") && note.n_type == XEN_ELFNOTE_PHYS32_ENTRY {
            if note.n_descsz >= 4
                && let Some(&[a, b, c, d]) = desc.get(..4)
            {
                return Ok(Some(u32::from_le_bytes([a, b, c, d])));
            }
            break;
        }
        let Some(next) = desc.get(desc_room..) else {
            break;
        };
        rest = next;
    }
    Ok(None)
}

use super::*;

#[test]
fn memory_that_its_source_could_cut_or_that_is_elsewhere_is_copied() {
    let of = |error: ShareError| PortError::from(BuildError::from(error));
    assert!(is_to_be_copied(&of(ShareError::Unsealed)));
    assert!(!is_to_be_copied(&of(ShareError::Kind)));
    assert!(!is_to_be_copied(&"a sentence".into()));
    let placed = |error: PlacementError| PortError::from(BuildError::from(error));
    let (guest, now, wanted) = (0, 1, 0);
    assert!(is_to_be_copied(&placed(PlacementError::Stays {
        guest,
        now,
        wanted
    })));
    let (node, nodes) = (7, 2);
    assert!(!is_to_be_copied(&placed(PlacementError::Guest {
        node,
        nodes
    })));
}

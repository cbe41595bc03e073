use super::*;

#[test]
fn memory_that_its_source_could_cut_is_copied() {
    let of = |error: ShareError| PortError::from(BuildError::from(error));
    assert!(is_unsealed(&of(ShareError::Unsealed)));
    assert!(!is_unsealed(&of(ShareError::Kind)));
    assert!(!is_unsealed(&"a sentence".into()));
}

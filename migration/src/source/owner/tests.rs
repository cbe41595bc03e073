use super::{Owner, Ownership};

#[test]
fn a_cancel_and_a_commit_exclude_each_other() {
    let owner = Ownership::default();
    assert!(owner.cancel() && owner.cancel() && owner.is_cancelled());
    assert!(!owner.commit());
    assert_eq!(owner.owner(), Owner::Source);

    let owner = Ownership::default();
    assert!(owner.commit());
    assert!(!owner.cancel() && !owner.is_cancelled());
    assert_eq!(owner.owner(), Owner::InDoubt);
    owner.confirm();
    assert!(!owner.cancel());
    assert_eq!(owner.owner(), Owner::Destination);
}

#[test]
fn what_was_not_started_can_be_cancelled_again() {
    let owner = Ownership::in_doubt();
    assert!(!owner.cancel());
    owner.take_back();
    assert_eq!(owner.owner(), Owner::Source);
    assert!(owner.cancel());
}

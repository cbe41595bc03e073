use super::*;
use crate::net::StreamLink;
use crate::wire::SessionId;
use std::sync::Mutex;

/// Two pages, and what was asked of it.
struct Small {
    pages: Mutex<Vec<[u8; PAGE_SIZE]>>,
    calls: Mutex<Vec<&'static str>>,
    starts: bool,
}

impl Small {
    fn new(starts: bool) -> Arc<Self> {
        Arc::new(Self {
            pages: Mutex::new(vec![[0; PAGE_SIZE]; 2]),
            calls: Mutex::default(),
            starts,
        })
    }

    fn note(&self, call: &'static str) -> Result<(), PortError> {
        self.calls.lock().unwrap().push(call);
        Ok(())
    }
}

impl Pausable for Small {
    fn stop(&self) -> Result<(), PortError> {
        self.note("stop")
    }
    fn resume(&self) -> Result<(), PortError> {
        self.note("resume")?;
        self.starts.then_some(()).ok_or_else(|| "no vCPU".into())
    }
    fn save(&self, _: Option<u32>) -> Result<Vec<u8>, PortError> {
        Ok(Vec::new())
    }
    fn give_away(&self, _: SessionId) -> Result<(), PortError> {
        self.note("give away")
    }
    fn release(&self) {}
}

impl SimpleVm for Small {
    fn layout(&self) -> RamLayout {
        RamLayout::new(vec![Run::new(0, 2)]).unwrap()
    }
    fn description(&self) -> Result<Vec<u8>, PortError> {
        Ok(b"small".to_vec())
    }
    fn read_page(&self, gfn: Gfn, into: &mut [u8; PAGE_SIZE]) -> Result<(), PortError> {
        *into = self.pages.lock().unwrap()[usize::try_from(gfn)?];
        Ok(())
    }
    fn write_page(&self, gfn: Gfn, page: &[u8; PAGE_SIZE]) -> Result<(), PortError> {
        self.pages.lock().unwrap()[usize::try_from(gfn)?] = *page;
        Ok(())
    }
    fn start_tracking(&self) -> Result<(), PortError> {
        Ok(())
    }
    fn stop_tracking(&self) {}
    fn collect_dirty(&self, _: &mut PageSet) -> Result<(), PortError> {
        Ok(())
    }
    fn clear_dirty(&self, _: &[Run]) -> Result<(), PortError> {
        Ok(())
    }
    fn restore(&self, _: &[u8]) -> Result<(), PortError> {
        self.note("restore")
    }
    fn discard(&self) {}
}

fn destination<V: DestinationVm<StreamLink>>(vm: V) -> V {
    vm
}

#[test]
fn a_destination_takes_only_its_like() {
    let vm = Small::new(true);
    let prepare = |layout: &RamLayout, description: &[u8]| {
        let prepared =
            DestinationVm::<StreamLink>::prepare(&mut Arc::clone(&vm), layout, description);
        prepared.map(|_| ()).map_err(|error| error.to_string())
    };
    let same = SimpleVm::layout(&*vm);
    let larger = RamLayout::new(vec![Run::new(0, 3)]).unwrap();
    assert_eq!(prepare(&same, b"small"), Ok(()));
    assert!(
        prepare(&larger, b"small")
            .unwrap_err()
            .contains("memory layout")
    );
    assert!(
        prepare(&same, b"large")
            .unwrap_err()
            .contains("same options")
    );
}

#[test]
fn pages_are_written_where_they_belong_and_no_part_of_one() {
    let vm = Small::new(true);
    let write = |run, bytes: &[u8]| PageSink::<StreamLink>::write(&*vm, run, bytes);
    let bytes: Vec<u8> = [[1; PAGE_SIZE], [2; PAGE_SIZE]].concat();
    write(Run::new(0, 2), &bytes).unwrap();
    let mut page = [0; PAGE_SIZE];
    PageSource::<StreamLink>::copy_page(&vm, 1, &mut page).unwrap();
    assert_eq!(page, [2; PAGE_SIZE]);
    for bytes in [&bytes[..PAGE_SIZE], &bytes[1..]] {
        assert!(write(Run::new(0, 2), bytes).is_err());
    }
}

#[test]
fn a_guest_runs_by_resume_and_says_when_it_does_not() {
    let mut vm = destination(Small::new(true));
    DestinationVm::<StreamLink>::restore(&mut vm, &[]).unwrap();
    DestinationVm::<StreamLink>::run(&mut vm).unwrap();
    assert_eq!(*vm.calls.lock().unwrap(), ["restore", "resume"]);
    let mut broken = destination(Small::new(false));
    let error = DestinationVm::<StreamLink>::run(&mut broken).unwrap_err();
    assert_eq!(error.to_string(), "no vCPU");
}

/// The pause's guard is that of [`Pausable`].
#[test]
fn a_source_that_is_paused_resumes_when_the_guard_is_dropped() {
    let vm = Small::new(true);
    drop(SourceVm::<StreamLink>::pause(&vm).unwrap());
    assert_eq!(*vm.calls.lock().unwrap(), ["stop", "resume"]);
}

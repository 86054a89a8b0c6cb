use super::*;

fn started() -> Status {
    let status = Status::new().unwrap();
    status.begin(Side::Source, true, &Arc::new(Wake::new().unwrap())).unwrap();
    status
}

#[test]
fn news_tells_every_state_once() {
    let status = started();
    status.advance(State::Active).unwrap();
    status.end(Err(Error::invalid("broken")));
    let names: Vec<_> = std::iter::from_fn(|| status.next_news()).map(|s| s.state.name()).collect();
    assert_eq!(names, ["setup", "active", "failed"]);
    assert_eq!(status.error().unwrap().to_string(), "source: broken");
}

#[test]
fn news_is_bounded() {
    let status = started();
    for _ in 0..2 * NEWS_MAX {
        status.tell();
    }
    status.advance(State::Active).unwrap();
    let news: Vec<_> = std::iter::from_fn(|| status.next_news()).collect();
    assert_eq!((news.len(), news.last().unwrap().state), (NEWS_MAX, State::Active));
}

#[test]
fn cancel_or_commit_but_not_both() {
    let status = started();
    status.advance(State::Active).unwrap();
    status.cancel().unwrap();
    status.cancel().unwrap();
    assert_eq!(status.commit().unwrap_err().errno(), libc::ECANCELED);
    status.end(status.check());
    assert_eq!((status.state(), status.error()), (State::Cancelled, None));

    let status = started();
    status.advance(State::Active).unwrap();
    status.commit().unwrap();
    assert_eq!(status.cancel().unwrap_err().errno(), libc::EBUSY);
}

#[test]
fn the_first_error_wins() {
    let status = started();
    status.fail(Error::invalid("first"));
    status.fail(Error::invalid("second"));
    assert_eq!(status.check().unwrap_err().text(), "first");
    assert_eq!(status.cause(Error::invalid("third")).text(), "first");
    assert_eq!(status.check_idle().unwrap_err().errno(), libc::EBUSY);
}

#[test]
fn wait_has_a_deadline() {
    let status = started();
    assert!(!status.wait(Some(Instant::now() + Duration::from_millis(5))));
    status.end(Err(Error::invalid("x")));
    assert!(status.wait(None));
}

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

#[test]
fn work_that_outlives_the_connection_goes_on_when_it_breaks() {
    let status = started();
    status.advance(State::Active).unwrap();
    status.fail_link(Error::invalid("link"));
    assert_eq!(status.check().unwrap_err().text(), "link");
    status.check_but_link().unwrap();
    status.fail(Error::invalid("device"));
    assert_eq!(status.check_but_link().unwrap_err().text(), "device");
}

#[test]
fn a_lost_link_is_no_end_but_any_other_error_is() {
    let status = started();
    status.advance(State::Active).unwrap();
    status.fail_link(Error::invalid("gone"));
    assert!(status.check().is_err());
    status.lose_link(Error::invalid("gone")).unwrap();
    assert_eq!((status.state(), status.check()), (State::Reconnecting, Ok(())));
    assert_eq!(status.error().unwrap().text(), "gone");
    status.advance(State::Active).unwrap();
    assert_eq!(status.error(), None);
    status.fail_link(Error::invalid("gone again"));
    status.fail(Error::invalid("worse"));
    assert_eq!(status.lose_link(Error::invalid("gone again")).unwrap_err().text(), "worse");

    let status = started();
    status.advance(State::Active).unwrap();
    status.lose_link(Error::invalid("gone")).unwrap();
    status.cancel().unwrap();
    assert_eq!(status.lose_link(Error::invalid("gone")).unwrap_err().errno(), libc::ECANCELED);
}

#[test]
fn an_operator_decides_alone_only_what_nobody_drives() {
    let status = started();
    status.advance(State::Active).unwrap();
    status.advance(State::Device).unwrap();
    status.name(State::SwitchoverUnknown, Error::invalid("asked again"), false);
    assert_eq!(status.check_undriven().unwrap_err().errno(), libc::EALREADY);
    status.end(Err(Error::invalid("refused")));
    status.check_undriven().unwrap();

    let status = started();
    status.advance(State::Active).unwrap();
    status.advance(State::Device).unwrap();
    status.end_unknown(Error::invalid("lost"));
    status.check_undriven().unwrap();
    status.resolve(true).unwrap();
    assert_eq!(status.state(), State::Failed);
}

use super::*;

fn list(workers: &[(&str, &str)]) -> BTreeMap<String, String> {
    let owned = |(id, at): &(&str, &str)| ((*id).to_owned(), (*at).to_owned());
    workers.iter().map(owned).collect()
}

#[test]
fn a_worker_named_twice_has_one_entry() {
    let table = Table::default();
    let fixed = table.add_static("127.0.0.1:1");
    let added = table
        .sync(&list(&[("a", "127.0.0.1:1"), ("b", "127.0.0.1:2")]))
        .added;
    assert_eq!(added.len(), 1);
    assert_eq!(added[0].name(), "b");
    assert!(fixed.status().registered);
    // Its key goes; its address was given, so it stays.
    let gone = table.sync(&list(&[])).removed;
    assert_eq!((gone.len(), gone[0].index), (1, added[0].index));
    assert!(!fixed.status().registered);
    assert_eq!(table.all().len(), 1);
}

#[test]
fn a_key_that_went_under_a_session_takes_the_entry_with_the_session() {
    let table = Table::default();
    let added = table.sync(&list(&[("a", "127.0.0.1:1")])).added;
    let (session, _commands) = SessionHandle::new();
    added[0].attach(session);
    assert!(table.sync(&list(&[])).removed.is_empty());
    assert!(!table.drop_gone(&added[0]), "its session lives");
    added[0].detach();
    assert!(table.drop_gone(&added[0]));
    assert!(table.all().is_empty());
    // One that has its key keeps its place without a session.
    let again = table.sync(&list(&[("a", "127.0.0.1:1")])).added;
    assert!(!table.drop_gone(&again[0]));
}

#[test]
fn a_fixed_address_that_is_a_registered_worker_goes() {
    let table = Table::default();
    let fixed = table.add_static("localhost:1");
    assert!(!table.drop_double(&fixed, "a"));
    let added = table.sync(&list(&[("a", "127.0.0.1:1")])).added;
    assert!(!table.drop_double(&added[0], "a"));
    assert!(table.drop_double(&fixed, "a"));
    assert_eq!(table.all().len(), 1);
}

#[test]
fn who_has_not_answered_is_waited_for_while_it_may_be_alive() {
    let within = Duration::from_secs(3);
    let table = Table::default();
    let entry = table.sync(&list(&[("a", "127.0.0.1:1")])).added.remove(0);
    let asked = Instant::now();
    let may = |after: Duration| entry.may_answer(asked, asked + after, within);
    // It is known of, and was not reached yet.
    assert!(may(Duration::ZERO) && may(within / 2));
    assert!(!may(within));
    entry.unreached(true);
    assert!(!may(Duration::ZERO));
    // Its machine does not answer any more: who knows what is there.
    entry.unreached(false);
    assert!(may(Duration::ZERO));
    entry.unreached(true);
    // Somebody came at another address.
    table.sync(&list(&[("a", "127.0.0.1:2")]));
    assert!(may(Duration::ZERO));
    // One that is there, and silent since it was asked.
    let (session, _commands) = SessionHandle::new();
    entry.unreached(true);
    entry.attach(session);
    entry.heard(asked);
    assert!(may(within * 9));
    entry.set_state(State::Lost(Suspicion::Silent));
    assert!(!may(Duration::ZERO));
    // One that says other things has them to say before: for a while.
    entry.set_state(State::Live);
    entry.asked(asked);
    entry.heard(asked + within / 2);
    assert!(may(within / 2));
    entry.asked(asked + within / 2);
    assert!(!may(within), "it leaves this unanswered for good");
    // It answers what it was asked before; the next question counts from then on.
    entry.answered();
    assert!(may(within));
    entry.asked(asked + within);
    assert!(may(within) && !may(within * 2));
    // Its session broke: from then on it is away.
    entry.detach();
    assert!(may(within));
    assert!(!may(within + within / 2));
}

#[test]
fn a_list_is_waited_for_while_it_may_come() {
    let (table, within) = (Table::default(), Duration::from_secs(3));
    assert!(!table.is_unlisted(Instant::now(), within));
    table.expects_list();
    assert!(table.is_unlisted(Instant::now(), within));
    assert!(!table.is_unlisted(Instant::now() + within, within));
    table.sync(&list(&[]));
    assert!(!table.is_unlisted(Instant::now(), within));
}

#[test]
fn a_new_address_is_taken_over() {
    let table = Table::default();
    let added = table.sync(&list(&[("a", "127.0.0.1:1")])).added;
    let again = table.sync(&list(&[("a", "127.0.0.1:2")]));
    assert!(again.added.is_empty() && again.removed.is_empty());
    assert_eq!(added[0].address(), "127.0.0.1:2");
}
